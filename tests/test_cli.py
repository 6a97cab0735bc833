"""The command line from end to end: real data files, real processes, real Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.image import imread
from typer.testing import CliRunner

import lowp
from lowp import cli
from lowp.hybrid import checkpoint, compare, config, experiment
from lowp.hybrid.run import RunFolder, records
from tests.hybrid_toys import without_time

pytestmark = pytest.mark.usefixtures("one_thread")

FRUIT = ["apple", "pear", "plum", "fig", "grape", "lemon"]
TOOLS = ["saw", "axe", "drill", "file", "plane", "lathe"]
TINY: dict[str, Any] = {
    "data": {"vocab_size": 64, "max_length": 12, "labels": 20, "tokenizer": "word"},
    "model": {"embedding": 8, "width": 8},
    "steps": 6, "batch_size": 4, "ratio": 1, "eval_every": 3, "checkpoint_every": 2, "threads": 1,
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with data.csv, heldout.tsv and run.yaml of a run that takes a second."""
    chance = random.Random(0)

    def rows(count: int) -> list[tuple[str, str]]:
        texts = []
        for number in range(count):
            kind, words = (("fruit", FRUIT), ("tools", TOOLS))[number % 2]
            texts.append((f"{number} " + " ".join(chance.choices([*words, "a", "the"], k=6)), kind))
        return texts

    (tmp_path / "data.csv").write_text(
        "text,label\n" + "".join(f'"{text}",{kind}\n' for text, kind in rows(60)))
    (tmp_path / "heldout.tsv").write_text(
        "text\tlabel\n" + "".join(f"{text} more\t{kind}\n" for text, kind in rows(20)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def arguments(files: Path, *more: str, command: str = "train") -> list[str]:
    return [command, "--config", str(files / "run.yaml"), "--data", str(files / "data.csv"),
            "--heldout", str(files / "heldout.tsv"), "--out", str(files / "run"), *more]


def invoke(*words: str) -> Any:
    result = CliRunner().invoke(cli.app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_train_fills_the_run_folder(files: Path) -> None:
    result = invoke(*arguments(files, "--seed", "3"))
    assert result.exit_code == 0, result.output
    run = files / "run"
    for folder in (run, run / "twin"):
        log = list(records(folder / "log.jsonl"))
        assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in log if "eval" in r] == [3, 6]
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["outcome"] == "finished"
        assert summary["heldout"] == log[-1]["eval"]
        assert summary["data"]["labelled"] == 20
        assert summary["data"]["held-out"] == 20
        page = (folder / "summary.md").read_text()
        assert f"{summary['heldout']['accuracy']:.4f}" in page
        for picture in ("loss.png", "accuracy.png"):
            height, width, _ = imread(folder / picture).shape
            assert height > 300 and width > 400
    settings = RunFolder.open(run).config
    assert (settings.seed, settings.steps, settings.precision.linear) == (3, 6, "int8")
    assert settings.data.path == files / "data.csv"
    assert RunFolder.open(run / "twin").config == compare.twin(settings)
    step = next(r for r in records(run / "log.jsonl") if r["step"] == 6 and "loss" in r)
    assert set(step["objectives"]) == {"supervised", "masked_lm", "consistency"}
    for term in step["objectives"].values():
        assert {"loss", "weight", "grad_norm"} <= set(term)
    assert "hybrid, int8" in result.output and "supervised, fp32" in result.output
    assert "bytes a" in result.output


def test_bytes_a_parameter_are_measured(files: Path) -> None:
    """bf16 weights, gradients and two moments against fp32: half, plus the step counters."""
    invoke(*arguments(files))
    low, full = (json.loads((files / "run" / part / "summary.json").read_text())
                 ["bytes_per_parameter"] for part in ("", "twin"))
    assert (low["weights"], low["gradients"]) == (2.0, 2.0)
    assert (full["weights"], full["gradients"]) == (4.0, 4.0)
    assert 4.0 <= low["states"] < 4.1
    assert 8.0 <= full["states"] < 8.1


def test_tensorboard_reads_what_the_log_says(files: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    invoke(*arguments(files, "--no-twin"))
    events = EventAccumulator(str(files / "run" / "tensorboard"))
    events.Reload()
    log = [r for r in records(files / "run" / "log.jsonl") if "loss" in r]
    scalars = events.Scalars("supervised/loss")
    assert [s.step for s in scalars] == [r["step"] for r in log]
    for scalar, record in zip(scalars, log, strict=True):
        # TensorBoard stores fp32: half a unit in the last place.
        assert scalar.value == pytest.approx(record["objectives"]["supervised"]["loss"], rel=2**-24)
    assert [s.step for s in events.Scalars("heldout/accuracy")] == [3, 6]


def test_a_finished_run_is_only_shown_again(files: Path) -> None:
    invoke(*arguments(files))
    before = (files / "run" / "log.jsonl").read_bytes()
    result = invoke("train", "--resume", str(files / "run"))
    assert result.exit_code == 0
    assert "hybrid, int8" in result.output
    assert (files / "run" / "log.jsonl").read_bytes() == before


def test_resume_from_any_checkpoint_gives_the_same_run(files: Path) -> None:
    """Through the real data, models, objectives and optimizer, and both kinds of model."""
    for number, model in enumerate(("lstm", "transformer")):
        out = files / f"run-{number}"
        words = arguments(files, "--no-twin", "--model", model, "--out", str(out),
                          "--set", "keep=9", "--set", "model.heads=2")
        assert invoke(*words).exit_code == 0
        log = without_time(list(records(out / "log.jsonl")))
        last = checkpoint.restore(out / "checkpoint").state
        for name in ("step-00000006", "step-00000004"):
            for file in (out / "checkpoint" / name).iterdir():
                file.unlink()
            (out / "checkpoint" / name).rmdir()
        (out / "summary.json").unlink()
        assert invoke("train", "--resume", str(out), "--no-twin").exit_code == 0
        assert without_time(list(records(out / "log.jsonl"))) == log
        packed, tensors = checkpoint.pack(checkpoint.restore(out / "checkpoint").state)
        assert packed == checkpoint.pack(last)[0]
        for key, tensor in checkpoint.pack(last)[1].items():
            assert torch.equal(tensor, tensors[key]), key


def test_ctrl_c_saves_and_says_how_to_go_on(files: Path) -> None:
    steps = ["--steps", "150", "--no-twin", "--set", "eval_every=50",
             "--set", "checkpoint_every=40"]
    assert invoke(*arguments(files, *steps)).exit_code == 0
    whole = without_time(list(records(files / "run" / "log.jsonl")))
    out = files / "broken off"
    words = [*arguments(files, *steps), "--out", str(out)]
    # A shell's background job ignores SIGINT, and tests may run in one.
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "lowp", *words],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(list(records(out / "log.jsonl"))) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Go on with:" in output
    assert "lowp train --resume" in output and "--no-twin" in output
    saved = checkpoint.restore(out / "checkpoint").step
    assert 5 <= saved < 150
    assert f"after step {saved}" in output
    done = list(records(out / "log.jsonl"))
    assert max(r["step"] for r in done) == saved
    assert (out / "summary.md").exists() and (out / "loss.png").exists()
    assert invoke("train", "--resume", str(out), "--no-twin").exit_code == 0
    assert without_time(list(records(out / "log.jsonl"))) == whole


@pytest.mark.parametrize(("words", "message"), [
    (["--set", "optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
    (["--set", "steps"], "expected key=value"),
    (["--model", "rnn"], "model.kind: Input should be 'lstm' or 'transformer', got 'rnn'"),
    (["--precision", "fp8"], "precision.linear"),
    (["--steps", "0"], "steps: Input should be greater than 0, got 0"),
    (["--steps", "many"], "--steps"),
    (["--stepz", "3"], "--stepz"),
    (["--data", "no such file.csv"], "no such file.csv"),
    (["--set", "data.text_column=words"], "words"),
    (["--config", "none.yaml"], "none.yaml: No such file"),
    (["--resume", "anywhere"], "--resume takes every setting from the run's"),
])
def test_what_is_wrong_is_said_with_exit_code_2(files: Path, words: list[str],
                                                message: str) -> None:
    result = invoke(*arguments(files), *words)
    assert result.exit_code == 2, result.output
    shown = " ".join(result.output.split())
    assert message in shown
    assert "Traceback" not in shown


def test_folders_that_are_wrong(files: Path) -> None:
    result = invoke("train", "--resume", str(files))
    assert result.exit_code == 2
    assert "holds no run" in result.output
    invoke(*arguments(files, "--no-twin"))
    result = invoke(*arguments(files))
    assert result.exit_code == 2
    assert "--resume" in result.output


def test_changed_data_are_not_gone_on_with(files: Path) -> None:
    invoke(*arguments(files, "--no-twin"))
    (files / "run" / "summary.json").unlink()
    text = (files / "data.csv").read_text()
    (files / "data.csv").write_text(text.replace("plum", "peach"))
    experiment.load_texts.cache_clear()
    result = invoke("train", "--resume", str(files / "run"), "--no-twin")
    assert result.exit_code == 1
    assert "no longer those that the run was trained on" in " ".join(result.output.split())


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(
        files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def full(root: Path, step: int, *rest: Any) -> Path:
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(root, step, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    result = invoke(*arguments(files))
    assert result.exit_code == 1
    assert "No space left" in result.output
    assert checkpoint.restore(files / "run" / "checkpoint").step == 2


def test_a_run_that_diverges_ends_with_exit_code_1(files: Path) -> None:
    result = invoke(*arguments(files, "--precision", "torch", "--set", "optimizer.lr=1e36",
                               "--set", "optimizer.kind=torch_adamw", "--set", "max_skipped=2",
                               "--set", "optimizer.warmup=0"))
    assert result.exit_code == 1, result.output
    assert "no step was applied any more" in " ".join(result.output.split())


def test_compare_runs_four_arms_on_every_seed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = files / "results" / "toy.json"
    words = arguments(files, "--seeds", "2", "--steps", "3", "--results", str(target),
                      command="compare")
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    assert target.with_suffix(".png").exists()
    assert [(row["seed"], row["arm"]) for row in report["rows"]] == [
        (seed, arm) for seed in (0, 1)
        for arm in ("supervised-fp32", "hybrid-fp32", "supervised-low", "hybrid-low")]
    accuracy = {(r["seed"], r["arm"]): r["accuracy"] for r in report["rows"]}
    pair = report["low_minus_fp32"]["hybrid"]
    expected = [100 * (accuracy[s, "hybrid-low"] - accuracy[s, "hybrid-fp32"]) for s in (0, 1)]
    assert pair["points"] == expected
    assert pair["mean"] == pytest.approx(sum(expected) / 2)
    assert pair["std"] == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5)
    assert report["arms"]["hybrid-low"] == "hybrid, int8, bf16 weights"

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "train", never)
    assert invoke(*words).exit_code == 0, "finished runs are taken as they are"
    assert json.loads(target.read_text()) == report


def test_compare_wants_four_different_arms(files: Path) -> None:
    result = invoke(*arguments(files, "--precision", "torch", command="compare"))
    assert result.exit_code == 2
    assert "expected a hybrid low-precision run" in " ".join(result.output.split())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int8_full"])
def test_the_recipe_reaches_every_linear_layer(precision: str) -> None:
    for kind in ("lstm", "transformer"):
        settings = config.resolve({"precision": {"linear": precision}, "model": {"kind": kind}})
        model = experiment.build_model(settings, torch.arange(100), 3)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert layers
        for name, layer in layers.items():
            assert isinstance(layer, lowp.Linear)
            assert layer.noise_id == lowp.key.tensor_id(name)
        assert precision in {layer.recipe.name for layer in layers.values()}
        plain = experiment.build_model(compare.full_precision(settings), torch.arange(100), 3)
        assert not any(isinstance(m, lowp.Linear) for m in plain.modules())
        for name, weight in plain.state_dict().items():
            ours = model.state_dict()[name]
            assert torch.equal(weight.to(ours.dtype), ours), "the twin starts from these weights"


def test_version_and_doctor() -> None:
    assert invoke("--version").output.strip() == lowp.__version__
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "self-test passed" in result.output
    assert json.loads(invoke("doctor", "--json").output)["self_test"]["passed"]
