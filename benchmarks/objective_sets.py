"""Held-out accuracy of objective sets in every precision, for two models and three corpora.

    python -m benchmarks.objective_sets --sst2 FOLDER [--seeds 3] [--steps 200] [--only docstrings]

FOLDER holds SST-2 as train.tsv and dev.tsv; the docstrings are those of the running Python. The
runs of one seed share data, labels and order. Writes results/objective_sets.json and .png after
every run; runs that are finished in --out are taken as they are, so the same command goes on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import RESULTS, record
from lowp.hybrid import compare, config, experiment
from lowp.hybrid.run import RunFolder

STEM = "objective_sets"
CORPORA = ("docstrings, 160 labels", "SST-2, 100 labels", "SST-2, 1000 labels")
MODELS = ("lstm", "transformer")
LANGUAGE_MODEL = {"kind": "language_model"}
UNSUPERVISED = "supervised + language model"
SETS: dict[str, dict[str, list[dict[str, Any]]]] = {
    CORPORA[0]: {
        UNSUPERVISED: [LANGUAGE_MODEL],
        "supervised + language model + consistency":
            [LANGUAGE_MODEL, {"kind": "consistency", "weight": {"end": 0.3}}],
    },
    CORPORA[1]: {
        UNSUPERVISED: [LANGUAGE_MODEL],
        "supervised + class LM + evidence bound":
            [{"kind": "class_lm"}, {"kind": "evidence_bound"}],
    },
    CORPORA[2]: {
        UNSUPERVISED: [LANGUAGE_MODEL],
        "supervised + UDA": [{"kind": "uda"}],
    },
}
TORCH = {"kind": "torch_adamw"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": {"linear": "torch"}, "optimizer": TORCH},
    "int8, int8 states": {"precision": {"linear": "int8"}, "optimizer": {"state_dtype": "int8"}},
    "bf16, SR": {"precision": {"linear": "bf16"}},
    "bf16 autocast": {"precision": {"linear": "autocast"}, "optimizer": TORCH},
}


class Run(NamedTuple):
    """One cell of the table with one seed."""

    precision: str
    seed: int
    corpus: str
    model: str
    objectives: str

    def settings(self, sst2: Path, steps: int) -> config.Config:
        """Its configuration, with the defaults of ``lowp train`` for all that is not named here."""
        values: dict[str, Any] = {
            **PRECISIONS[self.precision], "model": {"kind": self.model},
            "objectives": [{"kind": "supervised"},
                           *SETS[self.corpus].get(self.objectives, [])],
            "steps": steps, "eval_every": steps, "checkpoint_every": steps, "keep": 1,
        }
        if self.corpus.startswith("SST-2"):
            values["data"] = {
                "path": sst2 / "train.tsv", "heldout": sst2 / "dev.tsv", "tokenizer": "word",
                "vocab_size": 8000, "labels": int(self.corpus.split()[1]),
            }
        return compare.with_seed(config.resolve(values), self.seed)

    def folder(self, out: Path) -> Path:
        """Where it is kept."""
        return out.joinpath(*(str(part).replace(" ", "-").replace(",", "") for part in self))


def grid(seeds: int) -> Iterator[Run]:
    """Every run, precision by precision, all seeds of a cell's corpus one after another."""
    for precision in PRECISIONS:
        for seed in range(seeds):
            for corpus, sets in SETS.items():
                for model in MODELS:
                    for objectives in ("supervised", *sets):
                        yield Run(precision, seed, corpus, model, objectives)


def row(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        **run._asdict(), "accuracy": summary["heldout"]["accuracy"],
        "macro_f1": summary["heldout"]["macro_f1"], "loss": summary["heldout"]["loss"],
        "seconds_per_step": summary["seconds_per_step"],
        "bytes_per_parameter": summary["bytes_per_parameter"]["total"],
        "steps": summary["steps"], "skipped_steps": summary["skipped_steps"],
    }


def cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean and spread of each cell over its seeds, in percent; the differences, paired by seed,
    to the supervised set in the same precision (``gain``) and to the same set in fp32
    (``minus_fp32``), in points."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for entry in rows:
        key = tuple(entry[name] for name in ("corpus", "model", "objectives", "precision"))
        found.setdefault(key, {})[entry["seed"]] = 100 * entry["accuracy"]
    result = []
    for (corpus, model, objectives, precision), values in found.items():
        cell: dict[str, Any] = {
            "corpus": corpus, "model": model, "objectives": objectives, "precision": precision,
            "seeds": len(values), **_spread("accuracy", list(values.values())),
        }
        for name, other in (("gain", (corpus, model, "supervised", precision)),
                            ("minus_fp32", (corpus, model, objectives, "fp32"))):
            base = found.get(other, {})
            if base is not values and set(base) >= set(values):
                cell.update(_spread(name, [values[seed] - base[seed] for seed in values]))
        result.append(cell)
    return result


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.fmean(values),
            f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0}


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """A panel for each corpus and model: accuracy of the sets, a colour for each precision."""
    from lowp.hybrid.curves import COLORS, new_figure, save_figure

    figure, axes = new_figure(len(CORPORA) * len(MODELS), width=3.2)
    panels = [(corpus, model) for corpus in CORPORA for model in MODELS]
    for ax, (corpus, model) in zip(axes, panels, strict=True):
        names = ["supervised", *SETS[corpus]]
        own = [cell for cell in table if (cell["corpus"], cell["model"]) == (corpus, model)]
        for shift, (color, precision) in enumerate(zip(COLORS, PRECISIONS, strict=False)):
            some = {cell["objectives"]: cell for cell in own if cell["precision"] == precision}
            at = [i + 0.15 * (shift - 1.5) for i, name in enumerate(names) if name in some]
            found = [some[name] for name in names if name in some]
            ax.errorbar(at, [c["accuracy"] for c in found], [c["accuracy_std"] for c in found],
                        color=color, marker="o", markersize=4, capsize=2, linestyle="",
                        label=precision)
        ax.set_xticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names],
                      fontsize=6)
        ax.set_title(f"{corpus}\n{model}", fontsize=8, loc="left")
    axes[0].set_ylabel("held-out accuracy, %", fontsize=9)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    """Run the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sst2", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="corpora whose names begin so")
    parser.add_argument("--out", type=Path, default=Path("runs") / STEM)
    arguments = parser.parse_args()
    if not (arguments.sst2 / "train.tsv").is_file():
        parser.error(f"--sst2: expected a folder with train.tsv and dev.tsv, got {arguments.sst2}")
    runs = list(grid(arguments.seeds))
    for run in runs:
        if not run.corpus.startswith(arguments.only):
            continue
        settings = run.settings(arguments.sst2, arguments.steps)
        folder = compare.open_or_create(run.folder(arguments.out), settings)
        if compare.finished(folder) is not None:
            continue
        _, summary = experiment.train(folder)
        shutil.rmtree(folder.checkpoints)
        print(*run, f"{100 * summary['heldout']['accuracy']:.2f} %", flush=True)
        write(runs, arguments.out)


def write(runs: list[Run], out: Path) -> None:
    """Write the table and its picture from every run that is finished."""
    rows = []
    for run in runs:
        path = run.folder(out)
        if (path / "config.yaml").exists():
            summary = compare.finished(RunFolder.open(path))
            rows += [row(run, summary)] if summary else []
    table = cells(rows)
    record(STEM, rows, cells=table)
    draw(table, RESULTS / f"{STEM}.png")


if __name__ == "__main__":
    main()
