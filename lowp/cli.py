"""The command line: ``lowp train``, ``compare``, ``report`` and ``doctor``.

Exit codes: 0 done, 1 failed, 2 a wrong option, configuration or data file, 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lowp

if TYPE_CHECKING:
    from lowp.hybrid.config import Config
    from lowp.hybrid.experiment import Experiment
    from lowp.hybrid.run import RunFolder

app = typer.Typer(
    help="Low-precision training for PyTorch.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
FAILED, WRONG, INTERRUPTED = 1, 2, 130

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
Data = Annotated[Path | None, typer.Option(
    "--data", help="CSV, TSV or JSONL with a text and a label column. "
    "Default: docstrings of this Python's standard library.")]
Unlabelled = Annotated[Path | None, typer.Option("--unlabelled", help="More texts, no labels.")]
Heldout = Annotated[Path | None, typer.Option("--heldout", help="Texts to measure accuracy on.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Hugging Face dataset, by name.")]
Labels = Annotated[int | None, typer.Option("--labels", help="How many labels to keep.")]
Model = Annotated[str | None, typer.Option("--model", help="lstm or transformer.")]
Precision = Annotated[str | None, typer.Option(
    "--precision", help="int8, int8_full, bf16, fp16, fp32, or torch for plain nn.Linear, autocast "
    "for nn.Linear under torch.autocast in bf16.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Training steps.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the run.")]
Setting = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Any other setting, such as optimizer.lr=1e-3.")]


class Stop(Exception):  # noqa: N818 (an exit with a message, not only after errors)
    """End the command with a message and an exit code."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def _exits() -> Iterator[None]:
    """What goes wrong as one message and an exit code."""
    from lowp.hybrid.checkpoint import CheckpointError
    from lowp.hybrid.config import ConfigError
    from lowp.hybrid.experiment import ResumeError
    from lowp.hybrid.run import RunError

    try:
        yield
    except Stop as stop:
        if str(stop):
            console.print(str(stop), highlight=False)
        raise typer.Exit(stop.code) from stop
    except (ConfigError, RunError, ValueError, FileNotFoundError) as error:
        _fail(error)
        raise typer.Exit(WRONG) from error
    except (CheckpointError, ResumeError, OSError) as error:
        _fail(error)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        console.print("Interrupted before anything new was saved.")
        raise typer.Exit(INTERRUPTED) from error


def _fail(error: Exception) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False,
                               soft_wrap=True)


def _settings(config: Path | None, flags: dict[str, Any], settings: list[str] | None) -> Config:
    """The YAML file, over it the named flags, over them ``--set``."""
    from lowp.hybrid import config as schema

    values = schema.read_yaml(config) if config is not None else {}
    for key, value in flags.items():
        if value is not None:
            # A path means the same when the run is resumed from another folder.
            plain = os.path.abspath(value) if isinstance(value, Path) else value
            schema.assign(values, key, plain)
    if flags.get("precision.linear") is not None:
        values["precision"].pop("weights", None)
    for text in settings or []:
        schema.assign(values, *schema.parse_assignment(text))
    return schema.resolve(values)


class Watch:
    """Shows a run: a bar with the losses and the time left, and a line for each evaluation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.accuracy = ""
        self._shown = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(24), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), console=console,
            transient=True,
        )
        self._task = self._progress.add_task(name, total=None, losses="reading the data")

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def ready(self, experiment: Experiment) -> None:
        """The data are read and the model is made."""
        trainer, facts = experiment.trainer, experiment.facts
        self._progress.update(self._task, total=trainer.steps, completed=trainer.step, losses="")
        console.print(
            f"[bold]{escape(self.name)}[/]: {facts['labelled']} labelled, {facts['unlabelled']} "
            f"unlabelled and {facts['held-out']} held-out texts of {facts['classes']} classes"
            + (f"; goes on after step {trainer.step}" if trainer.step else ""), highlight=False)

    def record(self, record: dict[str, Any]) -> None:
        """One record of the log."""
        for event in record.get("fallback", ()):
            console.print(f"  step {record['step']}: {_event(event)}", highlight=False)
        if "eval" in record:
            heldout = record["eval"]
            self.accuracy = f"held-out {100 * heldout['accuracy']:.1f} %"
            console.print(f"  step {record['step']}: {self.accuracy} accuracy, macro-F1 "
                          f"{100 * heldout['macro_f1']:.1f} %", highlight=False)
            return
        if "skipped" in record:
            why = "; ".join(filter(None, (record["skipped"], record.get("culprit"))))
            console.print(f"  [yellow]step {record['step']} not applied[/]: {escape(why)}")
        now = time.monotonic()
        if now - self._shown < 0.1 and self._progress.tasks[0].total != record["step"]:
            return
        self._shown = now
        losses = [f"{name} {term['loss']:.3f}" for name, term in
                  record.get("objectives", {}).items() if "loss" in term]
        self._progress.update(self._task, completed=record["step"],
                              losses="  ".join([*losses, self.accuracy]))


def _event(event: dict[str, Any]) -> str:
    """A change of a layer's recipe in words."""
    if "sqnr" not in event:
        return f"layer {event['layer']} is back at {event['recipe']}"
    return (f"layer {event['layer']} runs in {event['recipe']} until step {event['until']}: "
            f"{event['operand']} had {event['sqnr']:.1f} dB")


def _train(name: str, folder: RunFolder, again: str) -> dict[str, Any]:
    """Train one folder under a progress bar; its summary.

    Args:
        again: the command that goes on after Ctrl-C.
    """
    from lowp.hybrid.experiment import train

    with Watch(name) as watch:
        outcome, summary = train(folder, watch.record, watch.ready)
    if outcome.status == "interrupted":
        raise Stop(INTERRUPTED, f"Interrupted and saved after step {outcome.step}. "
                   f"Go on with:\n  {escape(again)}")
    if outcome.status == "diverged":
        raise Stop(FAILED, f"[bold red]error:[/] stopped after step {outcome.step}, as no step was "
                   f"applied any more ({outcome.reason}). The last checkpoint is in "
                   f"{escape(str(folder.checkpoints))}.")
    return summary


@app.command()
def train(config: ConfigFile = None, data: Data = None, unlabelled: Unlabelled = None,
          heldout: Heldout = None, dataset: Dataset = None, labels: Labels = None,
          model: Model = None, precision: Precision = None, steps: Steps = None,
          seed: Seed = None, settings: Setting = None,
          out: Annotated[Path | None, typer.Option(
              "--out", help="Folder of the run. Default: a new one under runs/.")] = None,
          resume: Annotated[Path | None, typer.Option(
              "--resume", help="Folder of a run to go on with; takes no other option.")] = None,
          twin: Annotated[bool, typer.Option(
              help="Also train the supervised-only fp32 twin to compare with.")] = True) -> None:
    """Train a text classifier under a hybrid objective in low precision.

    Beside it its twin is trained, supervised only with fp32 nn.Linear layers and torch's AdamW,
    and both are compared at the end.
    """
    flags = {"data.path": data, "data.unlabelled": unlabelled, "data.heldout": heldout,
             "data.dataset": dataset, "data.labels": labels, "model.kind": model,
             "precision.linear": precision, "steps": steps, "seed": seed}
    from lowp.hybrid import ranks

    with _exits(), ranks.started():
        console.quiet = ranks.rank() > 0
        if resume is not None:
            given = [key for key, value in {**flags, "config": config, "set": settings,
                                            "out": out}.items() if value is not None]
            if given:
                raise Stop(WRONG, "[bold red]error:[/] --resume takes every setting from the run's "
                           f"config.yaml; leave out {', '.join(given)}")
            _train_with_twin(resume, None, twin)
        else:
            folder = out or Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
            folder = ranks.from_first(folder)
            _train_with_twin(folder, _settings(config, flags, settings), twin)


def _train_with_twin(path: Path, settings: Config | None, with_twin: bool) -> None:
    """Train the run of a folder, then its twin, and compare them.

    Args:
        settings: of a new run; ``None`` to go on with what the folder holds.
    """
    from lowp.hybrid import compare, curves, ranks
    from lowp.hybrid.run import RunFolder

    main = compare.start(path, settings) if settings is not None else RunFolder.open(path)
    folders = {compare.label(main.config): main}
    other = compare.twin(main.config)
    if with_twin and other != main.config:
        folders[compare.label(other)] = compare.open_or_create(path / "twin", other)
    again = f"lowp train --resume {path}" + ("" if with_twin else " --no-twin")
    summaries = {
        name: compare.finished(folder) or _train(name, folder, again)
        for name, folder in folders.items()
    }
    if len(folders) > 1 and ranks.rank() == 0:
        chance = next(iter(summaries.values()))["data"]["most frequent class"]
        curves.draw_accuracy({name: folder.records() for name, folder in folders.items()},
                             path / "accuracy.png", chance)
    console.print(compare.table(summaries))
    for name in ("summary.md", "loss.png", "accuracy.png", "log.jsonl", "tensorboard"):
        console.print(f"  {escape(str(path / name))}", highlight=False, soft_wrap=True)


@app.command()
def compare(runs: Annotated[list[Path] | None, typer.Argument(
                help="Folders of runs, two or more, to draw over each other.")] = None,
            config: ConfigFile = None, data: Data = None, unlabelled: Unlabelled = None,
            heldout: Heldout = None, dataset: Dataset = None, labels: Labels = None,
            model: Model = None, precision: Precision = None, steps: Steps = None,
            settings: Setting = None,
            seeds: Annotated[int, typer.Option(min=2, help="How many seeds: 0, 1, 2, …")] = 5,
            out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/compare"),
            results: Annotated[Path | None, typer.Option(
                help="JSON file to write; a PNG goes beside it. Default: in --out.")] = None,
            ) -> None:
    """Compare {supervised, hybrid} × {fp32 nn.Linear and torch AdamW, lowp} on several seeds.

    Finished runs in --out are taken as they are: the same command goes on where it was broken off.
    With RUNS nothing is trained: their losses and held-out metrics are drawn into one picture.
    """
    from lowp.hybrid import compare as comparison
    from lowp.hybrid import ranks

    if runs:
        with _exits():
            _overlay(runs, (results or Path("curves")).with_suffix(".png"))
        return

    flags = {"data.path": data, "data.unlabelled": unlabelled, "data.heldout": heldout,
             "data.dataset": dataset, "data.labels": labels, "model.kind": model,
             "precision.linear": precision, "steps": steps}
    with _exits(), ranks.started():
        console.quiet = ranks.rank() > 0
        chosen = _settings(config, flags, settings)
        target = results or out / "comparison.json"
        run = functools.partial(_train, again="the same command")
        report = comparison.compare(chosen, range(seeds), out, target, run)
        console.print(comparison.comparison_table(report))
        for kind, pairs in (("hybrid - supervised", report["hybrid_minus_supervised"]),
                            ("low precision - fp32", report["low_minus_fp32"])):
            for name, pair in pairs.items():
                console.print(f"  {kind}, {name}: {pair['mean']:+.2f} points "
                              f"± {pair['standard_error']:.2f} (standard error)", highlight=False)
        console.print(f"  {escape(str(target))}", highlight=False, soft_wrap=True)


def _overlay(runs: list[Path], picture: Path) -> None:
    from lowp.hybrid.curves import draw_overlay
    from lowp.hybrid.run import RunFolder

    if len(set(runs)) != len(runs) or len(runs) < 2:
        raise Stop(WRONG, "[bold red]error:[/] expected two or more different run folders")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_overlay({str(path): RunFolder.open(path).records() for path in runs}, picture)
    console.print(f"  {escape(str(picture))}", highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run.")],
           as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
           ) -> None:
    """Show what low precision does to every layer of a run, at its newest checkpoint.

    One labelled batch goes through the model; report.json and report.png are written into the run's
    folder.
    """
    from lowp.hybrid.experiment import inspect
    from lowp.hybrid.run import RunFolder

    with _exits():
        found = inspect(RunFolder.open(run))
        (run / "report.json").write_text(found.to_json(), encoding="utf-8")
        found.draw(run / "report.png")
        if as_json:
            typer.echo(found.to_json())
            return
        console.print(found.table())
        console.print(f"updates: {found.update}", highlight=False)
        for fqn, reason in found.unmeasured:
            console.print(f"not measured: {escape(fqn)}: {escape(reason)}", highlight=False)
        for name in ("report.json", "report.png"):
            console.print(f"  {escape(str(run / name))}", highlight=False, soft_wrap=True)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
           ) -> None:
    """Show versions, CPU, backends with the reason of each refusal, and a self-test."""
    from lowp import doctor as examination

    found = examination.collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for part in examination.render(found):
            console.print(part)
    if not found["self_test"]["passed"]:
        raise typer.Exit(FAILED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(lowp.__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
        ) -> None:
    """Low-precision training for PyTorch."""


def main() -> None:
    """The console script ``lowp``."""
    app()
