"""What README.md claims is what the committed measurements say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lowp.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def measured(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def row_of(name: str) -> str:
    """The table row whose last cell names a file of results."""
    (row,) = [line for line in README.splitlines() if line.rstrip(" |").endswith(f"`{name}`")]
    return row


@pytest.mark.parametrize("name", ("hybrid_docstrings.json", "hybrid_sst2.json"))
def test_accuracy_of_every_arm(name: str) -> None:
    row, means = row_of(name), measured(name)["means"]
    assert f"{len(measured(name)['seeds'])} paired seeds" in row
    found = re.findall(r"(\d+\.\d) %", row)
    order = ("supervised-fp32", "supervised-low", "hybrid-fp32", "hybrid-low")
    assert found == [f"{100 * means[arm]['accuracy']:.1f}" for arm in order]


def test_speed_ratios() -> None:
    row = row_of("scaled_mm.json")
    rows = measured("scaled_mm.json")["rows"]
    peers = ("torch._int_mm + scales", "torch torch.float32")
    for peer in peers:
        ratios = [r[f"lowp is x times {peer}"] for r in rows if r["M"] >= 512]
        few = [r[f"lowp is x times {peer}"] for r in rows if r["M"] < 32]
        for some in (ratios, few):
            assert f"{min(some):.1f} to {max(some):.1f}" in row, peer
    row, rows = row_of("adamw.json"), measured("adamw.json")["rows"]
    (int8,) = [r for r in rows if r["states"] == "int8"]
    for peer in ("torch fused", "torchao", "bitsandbytes"):
        assert f"{int8[f'lowp is x times {peer}']:.1f} × {peer}" in row, peer
    (bf16,) = [r for r in rows if (r["dtype"], r["states"], r["rounding"]) == (
        "torch.bfloat16", "as weights", "stochastic")]
    assert f"with bf16 states {bf16['lowp is x times torch fused']:.1f} × torch fused" in row
    small = [r["lowp is x times torch fused"] for r in rows if "small tensors" in r["states"]]
    assert f"elements at least {min(small):.2f} × torch fused" in row


def span(ratios: list[float]) -> str:
    return f"{min(ratios):.1f} to {max(ratios):.1f} ×"


def test_speed_of_layers_and_steps() -> None:
    row, rows = row_of("linear.json"), measured("linear.json")["rows"]
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        ratios = [r["lowp is x times torch"] for r in rows if r["dtype"] == f"torch.{dtype}"]
        assert f"{short} {span(ratios)}" in row, short
    ratios = [r["lowp is x times nn.Linear torch.float32"] for r in measured("layer.json")["rows"]
              if r["recipe"] == "int8_full" and r["width"] >= 1024]
    assert span(ratios) in row_of("layer.json")
    row, rows = row_of("training_step.json"), measured("training_step.json")["rows"]
    plain, ours = (next(r for r in rows if r["recipe"] == n) for n in ("nn.Linear", "int8_full"))
    (ratio,) = [v for key, v in ours.items() if key.startswith("step is x times")]
    sizes = [r["resident bytes/param"] for r in (ours, plain)]
    assert f"{ratio:.1f} ×" in row and "{:.1f} against {:.1f} bytes".format(*sizes) in row


def reached(work: str) -> str:
    """What the table of aims says of a work that begins so."""
    (row,) = [line for line in BENCHMARKS.splitlines() if line.startswith(f"| {work}")]
    return row.split("|")[3].strip()


def test_aims_of_products() -> None:
    layers, products = measured("layer.json")["rows"], measured("linear.json")["rows"]
    for work, dtype in (("`linear` in fp32", "float32"), ("`linear` in bf16", "bfloat16")):
        own = [r["lowp is x times torch"] for r in products if r["dtype"] == f"torch.{dtype}"]
        assert reached(work) == span(own)

    def in_layers(recipe: str, peer: str) -> str:
        return span([r[f"lowp is x times nn.Linear torch.{peer}"] for r in layers
                     if r["recipe"] == recipe and r["width"] >= 1024])

    half = [r["lowp is x times torch"] for r in products if r["dtype"] == "torch.float16"]
    assert reached("`linear` in fp16") == f"{span(half)}; {in_layers('fp16', 'float32')} in a layer"
    full = [in_layers("int8_full", peer) for peer in ("float32", "bfloat16")]
    assert reached("`int8_full` layer") == "; ".join(full)
    rows = measured("scaled_mm.json")["rows"]
    large, (small,), few = (
        [r["lowp is x times torch._int_mm + scales"] for r in rows if r["M"] in counts]
        for counts in (range(512, 4096), (32,), range(32)))
    assert reached("`scaled_mm`") == (
        f"{span(large)}, {small:.1f} × at 32 rows, {span(few)} at 1 and 8")
    calls = {recipe: [1 / r["lowp is x times nn.Linear torch.float32"] for r in layers
                      if (r["width"], r["recipe"]) == (64, recipe)] for recipe in RECIPES}
    assert reached("host time") == "with gradients " + ", ".join(
        f"{recipe} {grad:.1f} × (without {plain:.1f})" for recipe, (plain, grad) in calls.items())


def test_aims_of_memory_bound_work() -> None:
    rows = {(r["op"], r["rounding"]): r for r in measured("quantize.json")["rows"]
            if r["op"].startswith("quantize torch.")}
    fp32, bf16 = ({rounding: rows[f"quantize torch.{dtype}", rounding]
                   for rounding in ("nearest", "stochastic")} for dtype in ("float32", "bfloat16"))
    shares = [100 * r["nearest"]["of the stream"] for r in (fp32, bf16)]
    assert reached("`quantize` by row, nearest") == "{:.0f} % fp32, {:.0f} % bf16".format(*shares)
    longer = [r["stochastic"]["times as long as nearest"] for r in (fp32, bf16)]
    assert reached("`quantize` by row, stoch") == "{:.1f} × fp32, {:.1f} × bf16".format(*longer)
    adamw = measured("adamw.json")["rows"]
    plain = next(r["torch fused [s]"] for r in adamw if r["dtype"] == "torch.float32")
    ours = {r["states"]: r for r in adamw
            if (r["dtype"], r["rounding"]) == ("torch.bfloat16", "stochastic")}
    own, codes = ours["as weights"], ours["int8"]
    assert reached("AdamW, bf16 weights and states") == (
        f"{plain / own['lowp [s]']:.1f} ×; {own['lowp is x times torch fused']:.1f} ×")
    assert reached("AdamW, bf16 weights, int8") == (
        f"{plain / codes['lowp [s]']:.1f} ×; {codes['lowp is x times torchao']:.1f} ×; "
        f"{codes['lowp is x times bitsandbytes']:.1f} ×")
    small = [r["lowp is x times torch fused"] for r in adamw if "small tensors" in r["states"]]
    assert reached("AdamW over 300") == f"{min(small):.1f} ×"


def test_aims_of_training() -> None:
    (ours,) = [r for r in measured("training_step.json")["rows"] if r["recipe"] == "int8_full"]
    (ratio,) = [v for key, v in ours.items() if key.startswith("step is x times")]
    assert reached("training step") == f"{ratio:.1f} ×"
    rows = {r["stored"]: r for r in measured("optimizer_memory.json")["rows"] if r["width"] == 4096}
    both = [rows[f"bf16, int8 states{how}"] for how in ("", ", gradient release")]
    peak, computed = ("{:.1f}; {:.1f}".format(*[r[key] for r in both])
                      for key in ("peak bytes/param", "computed bytes/param"))
    assert reached("peak bytes") == f"{peak} (computed {computed})"


def test_objective_sets() -> None:
    row, cells = row_of("objective_sets.json"), measured("objective_sets.json")["cells"]
    hybrid = ("consistency", "evidence bound", "UDA")
    said = {"fp32": "fp32", "int8, int8 states": "int8", "bf16, SR": "bf16",
            "bf16 autocast": "autocast"}
    for precision, name in said.items():
        own = [c for c in cells if c["precision"] == precision]
        assert len(own) == 18 and all(c["seeds"] == 3 for c in own), precision
        gains = [c["gain"] for c in own if c["objectives"].endswith(hybrid)]
        assert len(gains) == 6 and f"{fmean(gains):+.1f} {name}" in row, precision
        if precision != "fp32":
            other = [c["minus_fp32"] for c in own]
            assert f"{name} over fp32 {fmean(other):+.1f}" in row, precision


def test_low_rank() -> None:
    (bound,) = re.findall(r"within (\d\.\d) point", row_of("low_rank.json"))
    means: dict[tuple[str, int], dict[str, float]] = {}
    rows = measured("low_rank.json")["rows"]
    for r in rows:
        own = [other["accuracy"] for other in rows if all(
            other[key] == r[key] for key in ("method", "rank", "precision"))]
        assert f"{len(own)} seeds" in row_of("low_rank.json")
        means.setdefault((r["method"], r["rank"]), {})[r["precision"]] = 100 * fmean(own)
    assert all(abs(m["int8"] - m["fp32"]) <= float(bound) for m in means.values())


def test_applications() -> None:
    row, found = row_of("applications.json"), measured("applications.json")
    losses = [entry["loss_above_fp32_percent"] for entry in found["comparison"]]
    said = [f"{abs(loss):.1f} % {'above' if loss > 0 else 'below'}" for loss in losses]
    assert " and ".join(said) + " fp32's" in row
    (seeds,) = {entry["seeds"] for entry in found["comparison"]}
    assert f"{seeds} seeds" in row
    plain, ours = ([r for r in found["rows"] if r["precision"] == p] for p in ("torch", "int8"))
    scores = [fmean(r["bleu"] for r in own if "bleu" in r) for own in (ours, plain)]
    assert "BLEU {:.1f} against {:.1f}".format(*scores) in row
    sizes = [f"{own[0]['bytes_per_parameter']:.1f}" for own in (ours, plain)]
    assert " against ".join(sizes) + " bytes" in row


def test_memory_of_processes() -> None:
    row = row_of("optimizer_memory.json")
    peak = {r["stored"]: r["peak bytes/param"] for r in measured("optimizer_memory.json")["rows"]
            if r["width"] == 4096}
    for text, arm in (("{:.1f} in fp32 with torch's fused AdamW", "fp32, torch fused AdamW"),
                      ("{:.1f} with int8 states;", "fp32, int8 states"),
                      ("in bf16 with int8 states {:.1f}", "bf16, int8 states"),
                      ("with gradient release {:.1f}", "bf16, int8 states, gradient release")):
        assert text.format(peak[arm]) in row, arm


def test_every_result_that_is_named_is_there() -> None:
    for name in re.findall(r"`(?:benchmarks/results/)?(\w+\.json)`", README):
        assert measured(name), name


def test_the_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 18
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True,
                          text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scaled_mm" in done.stdout and "grad cosine" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
@pytest.mark.parametrize("target", ("train", "test"))
def test_make_does_the_same(target: str) -> None:
    marked = re.search(rf"<!-- {target} -->\n```bash\n(.*?)```", README, re.S)
    assert marked is not None
    *install, last = marked[1].strip().splitlines()
    done = subprocess.run(["make", "-n", "-B", target], capture_output=True, text=True, cwd=ROOT)
    lines = [re.sub(r"\S*/bin/", "", line) for line in done.stdout.splitlines()]
    assert last in lines and install[-1] in lines
