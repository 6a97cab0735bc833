"""Pictures of runs: the losses, the held-out accuracy, and the comparison of several arms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3566b8", "#d1662b", "#3d8f5f", "#8a57a8", "#9c7a28", "#5b6470")
INK, FAINT = "#2b2f36", "#d9dce1"


def new_figure(panels: int, width: float = 5.0, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A row of plain panels. The canvas needs no display and no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width * panels, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.tick_params(colors=INK, labelsize=8)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, format="png")
    fresh.replace(path)


def smoothed(values: Sequence[float], factor: float = 0.95) -> list[float]:
    """Exponential mean with its start corrected, as Adam corrects its moments."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = factor * mean + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        result.append(mean / weight)
    return result


def draw_losses(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One panel an objective: its raw loss, faint, and smoothed; its weight where that changes."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        for name, term in record.get("objectives", {}).items():
            if "loss" in term:
                curves.setdefault(name, []).append((record["step"], term["loss"], term["weight"]))
    figure, axes = new_figure(max(1, len(curves)))
    for ax, color, (name, points) in zip(axes, _cycle(len(curves)), curves.items(), strict=False):
        steps, losses, weights = zip(*points, strict=True)
        ax.plot(steps, losses, color=color, alpha=0.25, linewidth=0.7)
        ax.plot(steps, smoothed(losses), color=color, linewidth=1.8)
        ax.set_title(name.replace("_", " "), fontsize=10, color=INK, loc="left")
        ax.set_xlabel("step", fontsize=9, color=INK)
        ax.set_ylim(bottom=0)
        if min(weights) != max(weights):
            twin = ax.twinx()
            twin.plot(steps, weights, color=INK, linewidth=0.9, linestyle=":")
            twin.set_ylabel("weight (dotted)", fontsize=8, color=INK)
            twin.tick_params(colors=INK, labelsize=7)
            twin.set_ylim(0, 1.05 * max(weights))
            twin.spines[["top"]].set_visible(False)
    axes[0].set_ylabel("loss", fontsize=9, color=INK)
    save_figure(figure, path)


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def draw_accuracy(runs: Mapping[str, Iterable[Mapping[str, Any]]], path: Path,
                  chance: float | None = None) -> None:
    """Held-out accuracy of each run over its steps.

    Args:
        runs: name of each run to its records.
        chance: accuracy of the most frequent class, drawn as a dotted line.
    """
    figure, (ax,) = new_figure(1, 6.0, 3.8)
    for color, (name, log) in zip(_cycle(len(runs)), runs.items(), strict=True):
        points = [(r["step"], 100 * r["eval"]["accuracy"]) for r in log if "eval" in r]
        if points:
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3,
                    label=f"{name}: {values[-1]:.1f} %")
    if chance is not None and math.isfinite(chance):
        ax.axhline(100 * chance, color=INK, linewidth=0.9, linestyle=":",
                   label=f"most frequent class: {100 * chance:.1f} %")
    ax.set_xlabel("step", fontsize=9, color=INK)
    ax.set_ylabel("held-out accuracy, %", fontsize=9, color=INK)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    save_figure(figure, path)


def draw_overlay(runs: Mapping[str, Iterable[Mapping[str, Any]]], path: Path) -> None:
    """Several runs over each other: the loss of every objective, smoothed, and what is held out.

    Args:
        runs: name of each run to its records. A run without a curve is missing in that panel.
    """
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {}

    def add(panel: str, run: str, step: int, value: float) -> None:
        steps, values = curves.setdefault(panel, {}).setdefault(run, ([], []))
        steps.append(step)
        values.append(value)

    for name, log in runs.items():
        for record in log:
            for objective, term in record.get("objectives", {}).items():
                if "loss" in term and math.isfinite(float(term["loss"])):
                    add(f"{objective.replace('_', ' ')}, loss", name, record["step"], term["loss"])
            for key, value in record.get("eval", {}).items():
                if isinstance(value, float) and math.isfinite(value):
                    add(f"held-out {key.replace('_', ' ')}", name, record["step"], value)
    figure, axes = new_figure(max(1, len(curves)))
    colors = dict(zip(runs, _cycle(len(runs)), strict=True))
    for ax, (panel, lines) in zip(axes, curves.items(), strict=False):
        for name, (steps, values) in lines.items():
            rough = panel.endswith(", loss")
            ax.plot(steps, smoothed(values) if rough else values, color=colors[name],
                    linewidth=1.6, marker="" if rough else "o", markersize=3, label=name)
        ax.set_title(panel, fontsize=10, color=INK, loc="left")
        ax.set_xlabel("step", fontsize=9, color=INK)
        ax.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def draw_comparison(accuracies: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Every seed's held-out accuracy of each arm as a point, each arm's mean as a bar.

    Args:
        accuracies: name of each arm to its accuracies, one a seed in the same order of seeds;
            lines join what one seed gave.
    """
    figure, (ax,) = new_figure(1, 1.2 + 1.9 * len(accuracies), 4.2)
    names = list(accuracies)
    for seed in zip(*accuracies.values(), strict=True):
        ax.plot(range(len(names)), [100 * v for v in seed], color=FAINT, linewidth=1.0, zorder=1)
    for place, (color, name) in enumerate(zip(_cycle(len(names)), names, strict=True)):
        values = [100 * v for v in accuracies[name]]
        mean = statistics.fmean(values)
        ax.plot([place] * len(values), values, "o", color=color, alpha=0.75, markersize=5, zorder=2)
        ax.hlines(mean, place - 0.22, place + 0.22, color=color, linewidth=2.6, zorder=3)
        ax.annotate(f"{mean:.1f}", (place + 0.25, mean), color=color, fontsize=9, va="center")
    ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
    ax.set_xlim(-0.5, len(names) - 0.3)
    ax.set_ylabel("held-out accuracy, %", fontsize=9, color=INK)
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.grid(axis="x", visible=False)
    save_figure(figure, path)
