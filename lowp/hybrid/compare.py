"""Runs side by side: a hybrid low-precision run and its twin, or all four arms on several seeds."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import lowp
from lowp.doctor import cpu_model
from lowp.hybrid import config, curves, objective_config, ranks
from lowp.hybrid.run import RunError, RunFolder

Summary = dict[str, Any]
Train = Callable[[str, RunFolder], Summary]


def supervised_only(settings: config.Config) -> config.Config:
    """The same run with cross-entropy on the labelled texts as its only objective."""
    kept = [o for o in settings.objectives if isinstance(o, objective_config.Supervised)]
    return settings.model_copy(update={
        "objectives": tuple(kept) or (objective_config.Supervised(kind="supervised"),),
        "mixing": objective_config.Mixing(),
    })


def full_precision(settings: config.Config) -> config.Config:
    """The same run with fp32 ``nn.Linear`` layers and torch's AdamW, no code of lowp's kernels."""
    objectives = tuple(o.model_copy(update={"precision": None}) for o in settings.objectives)
    return settings.model_copy(update={
        "precision": config.Precision(linear="torch", weights="fp32"), "objectives": objectives,
        "optimizer": settings.optimizer.model_copy(update={"kind": "torch_adamw"}),
    })


def twin(settings: config.Config) -> config.Config:
    """What a run is measured against: supervised only, fp32."""
    return full_precision(supervised_only(settings))


def numbers_of(settings: config.Config) -> str:
    """A run's numbers in a few words, such as ``int8, bf16 weights``."""
    precision = settings.precision
    if precision.linear == "torch":
        return "fp32 nn.Linear"
    if precision.linear == "autocast":
        return "nn.Linear under bf16 autocast"
    return f"{precision.linear}, {precision.weights} weights"


def label(settings: config.Config) -> str:
    """A run in a few words, such as ``hybrid, int8, bf16 weights``."""
    is_hybrid = any(not isinstance(o, objective_config.Supervised) for o in settings.objectives)
    return f"{'hybrid' if is_hybrid else 'supervised'}, {numbers_of(settings)}"


def arms(settings: config.Config) -> dict[str, config.Config]:
    """{supervised only, hybrid} × {fp32 nn.Linear and torch AdamW, the run's own low precision}."""
    return {
        "supervised-fp32": twin(settings),
        "hybrid-fp32": full_precision(settings),
        "supervised-low": supervised_only(settings),
        "hybrid-low": settings,
    }


def with_seed(settings: config.Config, seed: int) -> config.Config:
    """The same run with another seed of everything, of the choice of labels too."""
    data = settings.data.model_copy(update={"seed": seed})
    return settings.model_copy(update={"seed": seed, "data": data})


def table(summaries: Mapping[str, Summary], title: str = "") -> Table:
    """Held-out accuracy, seconds a step and bytes a parameter of each run."""
    result = Table(title=title or None, title_justify="left")
    result.add_column("run")
    for name in ("held-out accuracy", "macro-F1", "seconds a step", "bytes a parameter"):
        result.add_column(name, justify="right")
    for name, summary in summaries.items():
        heldout, seconds = summary["heldout"], summary["seconds_per_step"]
        memory = summary["bytes_per_parameter"]["total"]
        accuracy = f"{100 * heldout['accuracy']:.2f} %" if heldout else "-"
        f1 = f"{100 * heldout['macro_f1']:.2f} %" if heldout else "-"
        result.add_row(name, accuracy, f1, f"{seconds:.4f}" if seconds else "-", f"{memory:.2f}")
    return result


def finished(folder: RunFolder) -> Summary | None:
    """The summary of a run that came to its end, else ``None``."""
    path = folder.path / "summary.json"
    text = ranks.from_first(path.read_text(encoding="utf-8") if path.is_file() else None)
    if text is None:
        return None
    summary: Summary = json.loads(text)
    return summary if summary["outcome"] in ("finished", "stopped early") else None


def start(path: Path, settings: config.Config) -> RunFolder:
    """A new folder, made by rank 0.

    Raises:
        RunError: there is a run in it already.
    """
    if ranks.rank() == 0:
        RunFolder.create(path, settings)
    ranks.wait()
    return RunFolder(path, settings)


def open_or_create(path: Path, settings: config.Config) -> RunFolder:
    """The folder of exactly this run: begun before, or new.

    Raises:
        RunError: the folder holds a run of another configuration.
    """
    if not ranks.from_first((path / "config.yaml").exists()):
        return start(path, settings)
    folder = RunFolder.open(path)
    if folder.config.digest() != settings.digest():
        raise RunError(f"{path} holds a run of another configuration; choose another --out")
    return folder


def compare(settings: config.Config, seeds: Sequence[int], out: Path, results: Path,
            train: Train) -> dict[str, Any]:
    """Run the four arms with each seed, and write ``results`` (JSON) and its picture beside.

    Runs that are finished in ``out`` are taken as they are, so a comparison that was broken off
    goes on.

    Args:
        settings: the hybrid low-precision run.
        seeds: at least two; the arms of one seed share data, labels and order.
        train: trains a run's folder and gives its summary; gets the run's name first.

    Raises:
        ValueError: fewer than two seeds, or one twice; two arms are the same run.
    """
    if len(seeds) < 2 or len(set(seeds)) != len(seeds):
        raise ValueError(f"lowp.hybrid.compare: expected two or more different seeds, got {seeds}")
    names = {arm: label(s) for arm, s in arms(settings).items()}
    if len(set(names.values())) != len(names):
        raise ValueError("lowp.hybrid.compare: expected a hybrid low-precision run, of which the "
                         f"other arms differ, got {label(settings)}")
    rows = []
    for seed in seeds:
        for arm, arm_settings in arms(with_seed(settings, seed)).items():
            folder = open_or_create(out / f"seed-{seed}" / arm, arm_settings)
            summary = finished(folder) or train(f"seed {seed}, {arm}", folder)
            rows.append({
                "seed": seed, "arm": arm, **summary["heldout"],
                "seconds_per_step": summary["seconds_per_step"],
                "bytes_per_parameter": summary["bytes_per_parameter"]["total"],
                "skipped_steps": summary["skipped_steps"],
            })
    data = summary["data"]
    report = {
        "environment": {
            "device": cpu_model(), "threads": torch.get_num_threads(),
            "lowp": lowp.__version__, "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "data": data, "seeds": list(seeds),
        "arms": names,
        "rows": rows, **verdict(rows), "config": settings.model_dump(mode="json"),
    }
    if ranks.rank() > 0:
        return report
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    curves.draw_comparison(
        {name: _column(rows, arm, "accuracy") for arm, name in names.items()},
        f"{data['name']}, {data['labelled']} labels, {len(seeds)} seeds",
        results.with_suffix(".png"))
    return report


def _column(rows: Sequence[Mapping[str, Any]], arm: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["arm"] == arm]


def _paired(rows: Sequence[Mapping[str, Any]], arm: str, base: str) -> dict[str, Any]:
    """Differences of accuracy seed by seed, in points, with their mean and its standard error."""
    pairs = zip(_column(rows, arm, "accuracy"), _column(rows, base, "accuracy"), strict=True)
    points = [100 * (a - b) for a, b in pairs]
    spread = statistics.stdev(points)
    return {"points": points, "mean": statistics.fmean(points), "std": spread,
            "standard_error": spread / math.sqrt(len(points))}


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each arm's mean and spread over the seeds, and the paired differences that are claimed."""
    means = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        accuracy = _column(rows, arm, "accuracy")
        means[arm] = {
            "accuracy": statistics.fmean(accuracy), "accuracy_std": statistics.stdev(accuracy),
            "macro_f1": statistics.fmean(_column(rows, arm, "macro_f1")),
            "seconds_per_step": statistics.median(_column(rows, arm, "seconds_per_step")),
            "bytes_per_parameter": statistics.fmean(_column(rows, arm, "bytes_per_parameter")),
        }
    return {
        "means": means,
        "hybrid_minus_supervised": {
            "fp32": _paired(rows, "hybrid-fp32", "supervised-fp32"),
            "low": _paired(rows, "hybrid-low", "supervised-low"),
        },
        "low_minus_fp32": {
            "supervised": _paired(rows, "supervised-low", "supervised-fp32"),
            "hybrid": _paired(rows, "hybrid-low", "hybrid-fp32"),
        },
    }


def comparison_table(report: Mapping[str, Any]) -> Table:
    """The arms' means with the spread over the seeds, and every seed's accuracy."""
    result = Table(title=f"{report['data']['name']}, {len(report['seeds'])} paired seeds",
                   title_justify="left")
    result.add_column("run")
    for name in ("held-out accuracy", "every seed, %", "seconds a step", "bytes a parameter"):
        result.add_column(name, justify="right")
    for arm, mean in report["means"].items():
        every = " ".join(f"{100 * v:.1f}" for v in _column(report["rows"], arm, "accuracy"))
        accuracy = f"{100 * mean['accuracy']:.2f} ± {100 * mean['accuracy_std']:.2f} %"
        result.add_row(report["arms"][arm], accuracy, every, f"{mean['seconds_per_step']:.4f}",
                       f"{mean['bytes_per_parameter']:.2f}")
    return result
