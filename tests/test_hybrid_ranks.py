"""Real processes over gloo: two ranks give the run of one, up to the order of fp32 sums."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import lowp
from lowp import cli
from lowp.hybrid import (
    CausalLM,
    Consistency,
    Contrastive,
    Denoising,
    FlexMatch,
    FreeMatch,
    LSTMClassifier,
    MaskedLM,
    MeanTeacher,
    PseudoLabel,
    Supervised,
    TransformerEncoder,
    VirtualAdversarial,
    checkpoint,
    ranks,
    sharding,
)
from lowp.hybrid.average import WeightAverage
from lowp.hybrid.batches import Stream
from lowp.hybrid.fallback import SqnrFallback
from lowp.hybrid.mixing import GradNorm
from lowp.hybrid.run import records
from lowp.hybrid.trainer import Trainer, WeightedObjective
from lowp.key import clock
from lowp.optim import AdamW
from tests.hybrid_toys import without_time
from tests.test_loop import texts
from tests.text_toys import CLASSES, VOCABULARY

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


def causal_terms() -> list[WeightedObjective]:
    return [
        WeightedObjective(Supervised()), WeightedObjective(CausalLM(), 0.5),
        WeightedObjective(Denoising(), 0.5),
        WeightedObjective(Consistency(FreeMatch(CLASSES, 0.9, fairness=0.0))),
        WeightedObjective(PseudoLabel(FlexMatch(CLASSES, 23, 0.28))),
    ]


def encoder_terms() -> list[WeightedObjective]:
    return [
        WeightedObjective(Supervised()), WeightedObjective(MaskedLM(0.3)),
        WeightedObjective(Contrastive(0.5)), WeightedObjective(MeanTeacher(0.9), 3.0),
        WeightedObjective(VirtualAdversarial(1.0)),
    ]


def unaveraged_terms() -> list[WeightedObjective]:
    return [term for term in encoder_terms() if term.name != "mean_teacher"]


CASES: dict[str, dict[str, Any]] = {
    "lstm": {"terms": causal_terms}, "encoder": {"terms": encoder_terms},
    "lstm in parts": {"terms": causal_terms, "accumulate": 2, "separate": True},
    "encoder balanced": {"terms": encoder_terms, "mixing": True, "project_conflicts": True},
    "poisoned": {"terms": causal_terms, "poison": True},
    "sharded lstm": {"terms": causal_terms, "shard": True},
    "sharded lstm in parts": {"terms": causal_terms, "shard": True, "accumulate": 2},
    "sharded adamw": {"terms": causal_terms, "shard": True, "low": True},
    "sharded encoder": {"terms": unaveraged_terms, "shard": True},
    "sharded poisoned": {"terms": causal_terms, "shard": True, "poison": True},
    "int8": {"terms": causal_terms, "precision": "int8", "fallback": True},
}


def run(case: str, state: Any = None) -> dict[str, Any]:
    """One case on this process's ranks, from the start or a state: log, weights, samples read."""
    options = dict(CASES[case])
    terms, poison = options.pop("terms")(), options.pop("poison", False)
    precision, is_causal = options.pop("precision", "fp32"), "lstm" in case or "enc" not in case
    if options.pop("fallback", False):
        options["fallback"] = SqnrFallback(1000.0, every=2, steps=2)
    if options.get("mixing"):
        options["mixing"] = GradNorm([term.name for term in terms])
    torch.manual_seed(0)
    clock.set(1)
    model = LSTMClassifier(VOCABULARY, CLASSES, 8, 8, dropout=0.2, precision=precision) \
        if is_causal else TransformerEncoder(VOCABULARY, CLASSES, width=8, depth=1, heads=2,
                                             max_length=16, dropout=0.2)
    is_low = options.pop("low", False)
    if is_low:
        model.to(torch.bfloat16)
    if options.pop("shard", False):
        sharding.shard(model)
    shares = ranks.rank(), ranks.world_size()
    streams = [Stream(texts(14, True), 8, 0, 0, *shares),
               Stream(texts(23, False), 12, 0, 1, *shares)]
    seen: list[list[int]] = [[], []]
    for stream, into in zip(streams, seen, strict=True):
        own = stream.next

        def watched(own: Any = own, into: list[int] = into) -> Any:
            batch = own()
            into += batch.sample_ids.tolist()
            return batch

        stream.next = watched  # type: ignore[method-assign]
    if poison:
        inner = terms[1].objective

        def spoiled(model: Any, batch: Any) -> Any:
            result = inner(model, batch)
            if int(clock.step) == 3 and ranks.rank() == ranks.world_size() - 1:
                result.loss = result.loss * math.nan
            return result

        spoiled.stream = "unlabelled"  # type: ignore[attr-defined]
        terms[1] = WeightedObjective(spoiled, name="spoiled")
    log: list[dict[str, Any]] = []
    states: dict[int, Any] = {}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    if is_low:
        optimizer = AdamW(model.named_parameters(), lr=0.05, eps=1.0, seed=3)
    trainer = Trainer(model, optimizer, terms, *streams, steps=STEPS, warmup=0.0, max_skipped=3,
                      record=log.append, checkpoint_every=3,
                      save=lambda step, state: states.setdefault(step, copy.deepcopy(state)),
                      **options)
    if state is not None:
        trainer.load_state_dict(state)
    outcome = trainer.run()
    weights = {n: sharding.whole(p).clone() for n, p in model.named_parameters()}
    return {"log": log, "seen": seen, "outcome": list(outcome), "states": states,
            "weights": weights, "kept": sum(sharding.local(p).numel() for p in model.parameters())}


def work(rank: int, port: int, folder: str) -> None:
    """The body of one rank: every case, into a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with ranks.started():
        found = {case: run(case) for case in CASES}
        if rank == 0:
            checkpoint.save(Path(folder), 3, found["sharded adamw"]["states"][3])
        ranks.wait()
        found["sharded adamw, resumed"] = run("sharded adamw",
                                              checkpoint.restore(Path(folder)).state)
        torch.manual_seed(rank)
        other = torch.nn.Linear(2, 2)
        try:
            ranks.check_equal(list(other.parameters()))
        except ValueError as error:
            found["unequal"] = str(error)
        uneven = ranks.gathered(torch.arange(3 + rank))
        found["gathered"] = uneven.tolist()
        found["refused"] = refusals()
        torch.save(found, Path(folder) / f"{rank}.pt")


def refusals() -> list[str]:
    """What is said of sharded weights where whole ones are needed."""
    model = sharding.shard(LSTMClassifier(VOCABULARY, CLASSES, 8, 8))
    options: dict[str, Any] = {"labelled": Stream(texts(14, True), 8), "project_conflicts": True}
    said = []
    for make in (lambda: Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0),
                                 [WeightedObjective(Supervised())], **options),
                 lambda: WeightAverage(0.9).start(model)):
        try:
            make()
        except ValueError as error:
            said.append(str(error))
    return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, in two processes of their own."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = multiprocessing.get_context("spawn")
    port = free_port()
    started = [processes.Process(target=work, args=(r, port, str(folder))) for r in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        assert process.exitcode == 0
    return [torch.load(folder / f"{r}.pt") for r in (0, 1)]


@pytest.mark.parametrize("case", [
    c for c in CASES if "poisoned" not in c and c not in ("int8", "sharded adamw")])
def test_two_ranks_give_the_curve_of_one(both: list[dict[str, Any]], case: str) -> None:
    alone = run(case)
    for number, found in enumerate(both):
        for name, weight in found[case]["weights"].items():
            assert torch.equal(weight, both[0][case]["weights"][name]), f"rank {number} drifted"
    for one, two in zip(alone["log"], both[0][case]["log"], strict=True):
        assert set(one["objectives"]) == set(two["objectives"])
        for name, term in one["objectives"].items():
            # Sums of below 200 fp32 terms of size below 4 in another order are 200 · 4 · 2^-24
            # = 5e-5 apart, over six steps, each of which passes on the last one's difference.
            assert two["objectives"][name]["loss"] == pytest.approx(term["loss"], abs=3e-4), name
            assert two["objectives"][name]["weight"] == pytest.approx(term["weight"], rel=1e-3)
            if "cosine" in term:
                assert two["objectives"][name]["cosine"] == pytest.approx(term["cosine"], abs=3e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    # One wrong share of one objective would be a tenth of the change; rounding is 1e-4 of it.
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(both[0][case]["weights"][name], weight, rtol=0, atol=1e-3)


def test_sharded_ranks_keep_a_part_and_any_number_goes_on(both: list[dict[str, Any]]) -> None:
    alone = run("sharded lstm")
    total = sum(weight.numel() for weight in alone["weights"].values())
    kept = [found["sharded lstm"]["kept"] for found in both]
    assert sum(kept) == total and max(kept) < 0.6 * total
    state = both[0]["sharded lstm"]["states"][3]
    for name, weight in alone["states"][3]["model"].items():
        torch.testing.assert_close(state["model"][name], weight, rtol=0, atol=1e-3)
    rest = run("sharded lstm", state)
    assert [r["step"] for r in rest["log"]] == [4, 5, 6]
    for name, weight in both[0]["sharded lstm"]["weights"].items():
        torch.testing.assert_close(rest["weights"][name], weight, rtol=0, atol=1e-3)


def test_sharded_bf16_weights_go_on_bit_for_bit(both: list[dict[str, Any]]) -> None:
    """Stochastic rounding and 16-bit moments on shards; on one rank the run goes on as well."""
    whole, resumed = (both[0][name] for name in ("sharded adamw", "sharded adamw, resumed"))
    assert without_time(resumed["log"]) == without_time(whole["log"])[-3:]
    for name, weight in whole["weights"].items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(both[1]["sharded adamw"]["weights"][name], weight)
        assert torch.equal(resumed["weights"][name], weight)
    alone = run("sharded adamw", whole["states"][3])
    for one, two in zip(alone["log"], whole["log"][-3:], strict=True):
        # Losses below 4 computed to bf16's 8 bits, over three steps: 3 · 4 · 2^-8
        for name, term in one["objectives"].items():
            assert two["objectives"][name]["loss"] == pytest.approx(term["loss"], abs=0.05)


def test_what_needs_whole_weights_is_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "expect whole weights, got sharded ones" in found["refused"][0]
        assert "whole, got sharded ones" in found["refused"][1]


def test_streams_are_shared_without_overlap(both: list[dict[str, Any]]) -> None:
    alone = run("lstm")
    for stream, batch in ((0, 8), (1, 12)):
        half = batch // 2
        parts = [found["lstm"]["seen"][stream] for found in both]
        joined = [n for step in range(STEPS) for part in parts
                  for n in part[step * half : (step + 1) * half]]
        assert joined == alone["seen"][stream]


@pytest.mark.parametrize("case", ["poisoned", "sharded poisoned"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(both: list[dict[str, Any]],
                                                          case: str) -> None:
    first, second = (found[case] for found in both)
    for log in (first["log"], second["log"]):
        assert [r["step"] for r in log if "skipped" in r] == [3, 4, 5], "the clock stands still"
        assert log[2]["skipped"] == "the loss of spoiled is nan"
        if case == "poisoned":
            assert log[2]["culprit"].startswith("spoiled, unlabelled stream: the loss itself")
    assert first["outcome"] == second["outcome"] and first["outcome"][:2] == ["diverged", 5]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]) and bool(weight.isfinite().all())


def test_ranks_agree_on_int8_and_on_the_fallback(both: list[dict[str, Any]]) -> None:
    first, second = (found["int8"] for found in both)
    assert all(torch.equal(first["weights"][n], second["weights"][n]) for n in first["weights"])
    events = [[r.get("fallback") for r in found["log"]] for found in (first, second)]
    assert events[0] == events[1] and any(events[0])


def test_ranks_that_begin_differently_are_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "others on rank 1 than on rank 0" in found["unequal"]
        assert found["gathered"] == [0, 1, 2, 0, 1, 2, 3]


def test_torchrun_trains_one_folder_and_one_rank_can_go_on(tmp_path: Path) -> None:
    """Two processes by torchrun, checkpoints resumed by one; beside it a run of one process."""
    chance = random.Random(1)
    words = {"a": ["apple", "pear", "plum"], "b": ["saw", "axe", "drill"]}
    lines = [f"{i} {' '.join(chance.choices(words[k], k=5))},{k}"
             for i in range(40) for k in ("a", "b")]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    settings = {
        "data": {"path": str(tmp_path / "data.csv"), "vocab_size": 64, "max_length": 10,
                 "tokenizer": "word", "labels": 24, "validation": 0.25},
        "model": {"embedding": 8, "width": 8}, "precision": {"linear": "fp32"}, "steps": 6,
        "batch_size": 4, "ratio": 1, "accumulate": 2, "eval_every": 3, "checkpoint_every": 3,
        "keep": 9,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["train", "--no-twin", "--config", str(tmp_path / "run.yaml"), "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               f"--master-port={free_port()}", "-m", "lowp", *words, str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(Path(lowp.__file__).parents[1]),
                   "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("labelled, ") == 1, "one rank speaks"

    def alone(*words: str) -> None:
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, result.output

    alone(*words, str(tmp_path / "one"))
    logs = {name: list(records(tmp_path / name / "log.jsonl")) for name in ("one", "two")}
    for one, two in zip(logs["one"], logs["two"], strict=True):
        assert one["step"] == two["step"] and ("eval" in one) == ("eval" in two)
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], abs=3e-4)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["outcome"] == "finished" and summary["data"]["validation"] == 6
    assert len(checkpoint.checkpoints(tmp_path / "two" / "best")) == 1
    # Drop the last checkpoint: one process takes the run of two ranks to its end.
    newest = checkpoint.checkpoints(tmp_path / "two" / "checkpoint")[0]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    (tmp_path / "two" / "summary.json").unlink()
    alone("train", "--no-twin", "--resume", str(tmp_path / "two"))
    again = list(records(tmp_path / "two" / "log.jsonl"))
    assert [r["step"] for r in again] == [r["step"] for r in logs["two"]]
    for before, after in zip(logs["two"], again, strict=True):
        if "loss" in before:
            assert after["loss"] == pytest.approx(before["loss"], abs=3e-4)
