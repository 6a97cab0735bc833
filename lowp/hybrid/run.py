"""A run's folder: its configuration, log, curves, checkpoints and one-page summary.

    config.yaml     every setting, defaults written out
    log.jsonl       one record a line: each step's losses, each evaluation
    tensorboard/    the same for TensorBoard
    loss.png accuracy.png
    tokenizer.json  the vocabulary
    checkpoint/     see lowp.hybrid.checkpoint
    best/           the best weights by the validation texts, if there are some
    summary.md summary.json
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lowp
from lowp.doctor import cpu_model
from lowp.hybrid.config import Config, ConfigError, read_yaml, resolve

Record = dict[str, Any]


class RunError(RuntimeError):
    """A run folder is there already, or is not one."""


def records(path: Path) -> Iterator[Record]:
    """The records of a log; a last line cut short by a crash is left out.

    Raises:
        RunError: another line is not a record.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise RunError(f"{path}, line {number}: not a record: {error}") from error
        yield record


def _plain(value: Any) -> Any:
    """With ``nan`` and ``inf`` as strings, for which JSON has no number."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Log:
    """The log as JSON lines and for TensorBoard, of one curve however often the run is resumed.

    Args:
        folder: the run's folder.
        step: the step that the run goes on after; later records are removed.
        tensorboard: also write for TensorBoard.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / "log.jsonl"
        kept = [r for r in records(self.path) if r["step"] <= step]
        fresh = self.path.with_suffix(".jsonl.new")
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(r, allow_nan=False) + "\n" for r in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        """Append one record; it is with the system, and so survives a kill, on return."""
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Put the log on the disk, before the checkpoint that it leads up to."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, float | int) and key != "step":
            yield f"train/{key}", float(value)
    for kind, key in (("heldout", "eval"), ("validation", "validation"), ("mixing", "mixing")):
        for name, value in record.get(key, {}).items():
            yield f"{kind}/{name}", value
    for name, term in record.get("objectives", {}).items():
        for key, value in term.items():
            yield f"{name}/{key}", value


class BytesPerParameter(NamedTuple):
    """Bytes of memory for each trained parameter, measured from the tensors."""

    weights: float
    gradients: float
    states: float

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.weights + self.gradients + self.states


def bytes_per_parameter(model: nn.Module, optimizer: Optimizer) -> BytesPerParameter:
    """Measure weights, gradients and the optimizer's states of the parameters that are trained.

    Those that no objective reads, as a language model head in a supervised run, have no states and
    are left out. A gradient that no backward left, as after a resume, counts with its weight's
    size: torch gives it the same shape and dtype.
    """
    trained = [p for p in model.parameters() if optimizer.state.get(p)]
    count = max(1, sum(p.numel() for p in trained))
    grads = [p if p.grad is None else p.grad for p in trained]
    states = [t for p in trained for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    weights, gradients, kept = (
        sum(t.nbytes for t in tensors) / count for tensors in (trained, grads, states)
    )
    return BytesPerParameter(weights, gradients, kept)


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder.
        config: the configuration that its ``config.yaml`` holds.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """Start a new folder.

        Raises:
            RunError: there is a run in it already.
        """
        if (path / "config.yaml").exists():
            raise RunError(f"{path} holds a run already; go on with --resume {path}, or choose "
                           "another --out")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is not a folder")
        path.mkdir(parents=True, exist_ok=True)
        fresh = path / "config.yaml.new"
        fresh.write_text(config.to_yaml(), encoding="utf-8")
        os.replace(fresh, path / "config.yaml")
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of a run that was begun.

        Raises:
            RunError: there is no run in it. ConfigError: its configuration is not a valid one.
        """
        file = path / "config.yaml"
        if not file.is_file():
            raise RunError(f"{path} holds no run: it has no config.yaml")
        try:
            return cls(path, resolve(read_yaml(file)))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoint"

    @property
    def best(self) -> Path:
        """Where the best weights lie."""
        return self.path / "best"

    def records(self) -> list[Record]:
        """The log so far."""
        return list(records(self.path / "log.jsonl"))

    def summarize(self, outcome: str, best: dict[str, float], memory: BytesPerParameter,
                  parameters: int, extra: dict[str, Any],
                  chosen: dict[str, float] | None = None) -> dict[str, Any]:
        """Write ``summary.json`` and ``summary.md``; the summary as it stands in the first.

        Args:
            outcome: how the run ended.
            best: the best evaluation and its step.
            memory: bytes for each parameter.
            parameters: how many the model has.
            extra: facts of the data, written as they are.
            chosen: held-out metrics of the weights that were chosen; by default the last ones'.
        """
        log = self.records()
        evals = [r for r in log if "eval" in r]
        seconds = [r["seconds"] for r in log if "seconds" in r]
        steps = [r for r in log if "objectives" in r]
        summary = {
            "outcome": outcome,
            "steps": max((r["step"] for r in log), default=0),
            "skipped_steps": sum("skipped" in r for r in log),
            "heldout": chosen or (evals[-1]["eval"] if evals else {}),
            "best": best,
            "losses": {n: t.get("loss") for n, t in steps[-1]["objectives"].items()} if steps
            else {},
            "seconds_per_step": statistics.median(seconds) if seconds else None,
            "bytes_per_parameter": {**memory._asdict(), "total": memory.total},
            "parameters": parameters,
            "data": extra,
            "device": cpu_model(),
            "threads": torch.get_num_threads(),
            "versions": {"lowp": lowp.__version__, "torch": str(torch.__version__),
                         "python": platform.python_version()},
            "config": self.config.model_dump(mode="json"),
        }
        text = json.dumps(_plain(summary), indent=2) + "\n"
        (self.path / "summary.json").write_text(text, encoding="utf-8")
        (self.path / "summary.md").write_text(_page(self.path.name, summary), encoding="utf-8")
        return summary


def _page(name: str, summary: dict[str, Any]) -> str:
    """The summary on one page of Markdown."""
    heldout, memory = summary["heldout"], summary["bytes_per_parameter"]
    config, data = summary["config"], summary["data"]
    seconds = summary["seconds_per_step"]
    measured, metric = ("validation macro-F1", "macro_f1") if config["data"]["validation"] \
        else ("held-out accuracy", "accuracy")
    rows = {
        "outcome": f"{summary['outcome']} after {summary['steps']} steps",
        "steps not applied": summary["skipped_steps"],
        **{f"held-out {key}": f"{float(value):.4f}" for key, value in heldout.items()},
        f"best {measured}": f"{summary['best'].get(metric, math.nan):.4f} "
                            f"at step {summary['best'].get('step', '-')}",
        "seconds a step (median)": "-" if seconds is None else f"{seconds:.4f}",
        "bytes a parameter": f"{memory['total']:.2f} = weights {memory['weights']:.2f} + gradients "
                             f"{memory['gradients']:.2f} + states {memory['states']:.2f}",
        "parameters": f"{summary['parameters']:,}",
        "device": f"{summary['device']}, {summary['threads']} threads",
        "versions": ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
        **{f"data: {key}": value for key, value in data.items()},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    losses = "\n".join(
        f"| {name} | {'-' if value is None else f'{float(value):.4f}'} |"
        for name, value in summary["losses"].items()
    )
    settings = ", ".join((
        f"model {config['model']['kind']}", f"linear layers {config['precision']['linear']}",
        f"weights {config['precision']['weights']}", f"optimizer {config['optimizer']['kind']}",
        f"seed {config['seed']}",
    ))
    return (
        f"# {name}\n\n{settings}. Every setting: config.yaml.\n\n| | |\n|---|---|\n{table}\n\n"
        f"| objective | loss at the last step |\n|---|---|\n{losses}\n\n"
        "![losses](loss.png)\n![held-out accuracy](accuracy.png)\n"
    )
