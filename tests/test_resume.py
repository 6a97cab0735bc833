"""A run that is broken off and resumed has the bits of one that was not, whatever broke it off."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lowp.hybrid import checkpoint
from lowp.hybrid.run import Log, records
from lowp.key import clock
from tests.hybrid_toys import toy_trainer, without_time

pytestmark = pytest.mark.usefixtures("one_thread")

KILLS, STEPS, INTERVAL = 56, 60, 2

def through_disk(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.save(folder, int(state["step"]), state, keep=1))


def assert_equal_states(a: Any, b: Any) -> None:
    """Equal bits of every tensor and number."""
    packed, tensors = checkpoint.pack(a)
    other_packed, other_tensors = checkpoint.pack(b)
    assert packed == other_packed
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8),
                           other_tensors[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("is_lowp", [False, True], ids=["torch", "lowp"])
def test_resumed_at_every_step_the_rest_is_the_same(tmp_path: Path, is_lowp: bool) -> None:
    states: dict[int, Any] = {}
    log: list[dict[str, Any]] = []
    whole = toy_trainer(
        24, is_lowp, record=log.append, checkpoint_every=1,
        save=lambda step, state: states.update({step: through_disk(state, tmp_path)}))
    whole.run()
    for step in range(1, 24):
        rest: list[dict[str, Any]] = []
        resumed = toy_trainer(24, is_lowp, record=rest.append)
        # A fresh process is elsewhere with everything that the state must bring back.
        clock.set(999)
        torch.rand(step)
        random.random()
        resumed.load_state_dict(states[step])
        resumed.run()
        assert without_time(rest) == [r for r in without_time(log) if r["step"] > step]
        assert_equal_states(resumed.state_dict(), whole.state_dict())


def test_a_state_of_something_else_is_refused() -> None:
    state = toy_trainer().state_dict()
    other = toy_trainer()
    other.model = torch.nn.Linear(6, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        other.load_state_dict(state)
    with pytest.raises(KeyError):
        toy_trainer().load_state_dict({**state, "streams": {}})


def test_the_log_of_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    log = Log(tmp_path, tensorboard=False)
    for step in range(1, 8):
        log.write({"step": step, "loss": step / 3, "odd": float("nan")})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # the kill came in the middle of a line
    assert [r["step"] for r in records(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    log = Log(tmp_path, step=5, tensorboard=False)
    log.write({"step": 6, "loss": 2.0})
    log.close()
    kept = list(records(tmp_path / "log.jsonl"))
    assert [r["step"] for r in kept] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in kept] == [1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0]
    assert kept[0]["odd"] == "nan", "as JSON has no number for it"


def train_to_the_end(folder: str) -> None:
    """The body of a training process: goes on from the newest checkpoint, as a run does."""
    torch.set_num_threads(1)  # a forked process must not use its parent's thread pool
    path = Path(folder)
    trainer = toy_trainer(STEPS, is_lowp=True, checkpoint_every=INTERVAL)
    if checkpoint.checkpoints(path / "checkpoint"):
        trainer.load_state_dict(checkpoint.restore(path / "checkpoint").state)
    log = Log(path, trainer.step, tensorboard=False)

    def save(step: int, state: dict[str, Any]) -> None:
        log.sync()
        checkpoint.save(path / "checkpoint", step, state)

    trainer.record, trainer.save = log.write, save
    trainer.run()


def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    """SIGKILL at random times in real processes, until each of several runs is through."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch._dynamo", "tests.test_resume"])

    def start(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        process = processes.Process(target=train_to_the_end, args=(str(folder),))
        process.start()
        return process

    duration = 60.0
    for name in ("first, which pays for the imports", "second", "whole"):
        begun = time.monotonic()
        process = start(tmp_path / name)
        process.join(120)
        duration = min(duration, time.monotonic() - begun)
        assert process.exitcode == 0
    curve = without_time(list(records(tmp_path / "whole" / "log.jsonl")))
    assert [r["step"] for r in curve if "loss" in r] == list(range(1, STEPS + 1))
    last = checkpoint.restore(tmp_path / "whole" / "checkpoint")

    chance = random.Random(int.from_bytes(random.SystemRandom().randbytes(8)))
    kills = writing = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{runs}"
        runs += 1
        done = False
        while not done:
            process = start(folder)
            if kills < KILLS:
                process.join(chance.uniform(0.05, 0.6) * duration)
                process.kill()
            process.join(60)
            done = process.exitcode == 0
            if done:
                break
            assert process.exitcode == -9, "a resumed run fails by nothing but the kill"
            kills += 1
            root = folder / "checkpoint"
            writing += root.is_dir() and any(p.name.startswith(".") for p in root.iterdir())
            logged = [r["step"] for r in records(folder / "log.jsonl")]
            if checkpoint.checkpoints(root):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # not even the newest may be damaged
                    saved = checkpoint.restore(root).step
                assert max(logged, default=0) - saved <= INTERVAL
            else:
                assert max(logged, default=0) <= INTERVAL
        assert without_time(list(records(folder / "log.jsonl"))) == curve
        final = checkpoint.restore(folder / "checkpoint")
        assert final.step == last.step
        assert_equal_states(final.state, last.state)
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "runs": runs, "in the middle of a save": writing,
                      "seconds of a whole run": round(duration, 3)}))
    assert writing > 0, "some kills must hit a checkpoint that is being written"
