"""report: what low precision does to every layer of a model on one batch."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowp.cost import Cost, cost
from lowp.explanation import explain
from lowp.key import Role, clock
from lowp.linear import Linear, linear
from lowp.ops.activation_grad import activation_grad
from lowp.quality import Fidelity, cosine, exact_step, first_adam_step, lost_updates, operands
from lowp.recipe import Recipe, recipe_of

if TYPE_CHECKING:
    from rich.table import Table

Objective = Callable[[nn.Module, Any], Any]
_ROLES = (int(Role.X_CODES), int(Role.WEIGHT_CODES), int(Role.GRAD_CODES_DGRAD))


@dataclass
class LayerReport:
    """One layer on one batch.

    Attributes:
        fqn, recipe: its qualified name and precision.
        shape: of the weight, [out, in]; rows: of its input, all leading dimensions together.
        fidelity: of ``x`` and ``w`` in the output product and ``dy`` in grad_input.
        gradient_cosine: of the weight's gradient to that of the same pass with all layers in fp32.
        lost_updates: part of the weight's updates that rounding to nearest would undo.
        backends: of each op of its products, with who else was refused why.
        cost: bytes and seconds; ``None`` where no gradient reached the layer.
    """

    fqn: str
    recipe: str
    shape: tuple[int, int]
    rows: int
    fidelity: dict[str, Fidelity]
    gradient_cosine: float | None
    lost_updates: float | None
    backends: list[dict[str, Any]]
    cost: Cost | None

    @property
    def backend(self) -> str:
        """The backends in use, in a word or two."""
        return ", ".join(sorted({choice["backend"] for choice in self.backends}))


@dataclass
class Report:
    """What :func:`report` found; prints as a table.

    Attributes:
        layers: in the order of the model.
        loss, loss_fp32: of the batch, with the model's recipes and with fp32 in their place.
        update: what the updates were taken from.
        unmeasured: other modules that hold a matrix, with the reason.
    """

    layers: list[LayerReport]
    loss: float
    loss_fp32: float
    update: str
    unmeasured: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> str:
        """Everything as JSON; what is not finite as a string."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n"

    def table(self) -> Table:
        """One row a layer."""
        from rich.table import Table as RichTable

        result = RichTable(title=f"loss {self.loss:.5f}, in fp32 {self.loss_fp32:.5f}",
                           title_justify="left")
        for name in ("layer", "recipe", "SQNR x/w/dy, dB", "saturated, %", "underflowed, %",
                     "grad cosine", "updates lost, %", "backend", "kB held", "ms", "predicted"):
            words = name in ("layer", "recipe", "backend")
            result.add_column(name, justify="left" if words else "right", overflow="fold",
                              no_wrap=not words)
        for layer in self.layers:
            parts = [layer.fidelity.get(name) for name in ("x", "w", "dy")]
            held = layer.cost
            result.add_row(
                layer.fqn or "(root)", layer.recipe,
                _joined(parts, lambda f: _decibel(f.sqnr)),
                _joined(parts, lambda f: f"{100 * f.saturated:.1f}"),
                _joined(parts, lambda f: f"{100 * f.underflowed:.1f}"),
                _number(layer.gradient_cosine, "{:.5f}"),
                _number(None if layer.lost_updates is None else 100 * layer.lost_updates, "{:.1f}"),
                layer.backend,
                "-" if held is None else f"{(held.weight + held.gradient + held.saved) / 1e3:.0f}",
                "-" if held is None else f"{1e3 * held.measured:.3f}",
                "-" if held is None else f"{1e3 * held.predicted:.3f}")
        return result

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=200)
        console.print(self.table())
        console.print(f"updates: {self.update}")
        reasons = {f"{c['op']}: {name} refused, {why}" for layer in self.layers
                   for c in layer.backends for name, why in c["refused"]}
        for reason in sorted(reasons):
            console.print(reason, highlight=False, markup=False)
        for fqn, reason in self.unmeasured:
            console.print(f"not measured: {fqn}: {reason}", highlight=False, markup=False)
        text = console.file
        assert isinstance(text, io.StringIO)
        return text.getvalue()

    def draw(self, path: str | Path) -> None:
        """A heat map, PNG: layers down, measures across."""
        from lowp.hybrid.curves import new_figure, save_figure

        columns: list[tuple[str, list[float]]] = [
            *((f"SQNR {part}, dB", [_of(layer, part, "sqnr") for layer in self.layers])
              for part in ("x", "w", "dy")),
            *((f"{what} {part}, %", [100 * _of(layer, part, what) for layer in self.layers])
              for what in ("saturated", "underflowed") for part in ("x", "w", "dy")),
            ("cosine", [_or_nan(layer.gradient_cosine) for layer in self.layers]),
            ("lost, %", [100 * _or_nan(layer.lost_updates) for layer in self.layers]),
        ]
        figure, (ax,) = new_figure(1, 2.5 + 0.75 * len(columns), 1.6 + 0.24 * len(self.layers))
        shades = [[_shade(name, value) for value in values] for name, values in columns]
        ax.imshow([list(row) for row in zip(*shades, strict=True)], cmap="RdYlGn", vmin=0, vmax=1,
                  aspect="auto")
        for x, (_, values) in enumerate(columns):
            for y, value in enumerate(values):
                ax.text(x, y, _cell(value), ha="center", va="center", fontsize=6)
        ax.set_xticks(range(len(columns)), [name for name, _ in columns], rotation=40, ha="right",
                      fontsize=7)
        ax.set_yticks(range(len(self.layers)), [layer.fqn or "(root)" for layer in self.layers],
                      fontsize=7)
        ax.grid(visible=False)
        ax.set_title("red: SQNR up to 20 dB, cosine up to 0.9, half of the elements or more",
                     fontsize=8, loc="left")
        save_figure(figure, Path(path))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Fidelity | Cost):
        return {key: _plain(inner) for key, inner in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _joined(parts: Sequence[Fidelity | None], show: Callable[[Fidelity], str]) -> str:
    return " / ".join("-" if part is None else show(part) for part in parts)


def _decibel(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _of(layer: LayerReport, part: str, what: str) -> float:
    found = layer.fidelity.get(part)
    return math.nan if found is None else float(getattr(found, what))


def _cell(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "exact" if value == math.inf else f"{value:.4g}"


def _shade(column: str, value: float) -> float:
    """0 (red) to 1 (green): SQNR 20 to 50 dB, cosine 0.9 to 1, a part of the elements 1/2 to 0."""
    if math.isnan(value):
        return value
    low, high = (20.0, 50.0) if column.startswith("SQNR") else \
        (0.9, 1.0) if column == "cosine" else (50.0, 0.0)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def loss_of(model: nn.Module, batch: Any, objective: Objective | None) -> Tensor:
    """The scalar loss of a batch.

    Raises:
        ValueError: it is no scalar, or the model's output has no ``loss`` and none is given.
    """
    if objective is not None:
        found = objective(model, batch)
    elif isinstance(batch, Mapping):
        found = model(**batch)
    elif isinstance(batch, tuple | list):
        found = model(*batch)
    else:
        found = model(batch)
    loss = found if isinstance(found, Tensor) else getattr(found, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError("lowp.report: expected a scalar loss that depends on the model, or an "
                         "objective (model, batch) -> loss, got "
                         + (f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor)
                            else type(found).__name__))
    return loss


@contextmanager
def _all_fp32(layers: Sequence[Any]) -> Any:
    """Inside, the products of the layers take their operands in fp32."""
    before = [layer.recipe for layer in layers]
    try:
        for layer in layers:
            layer.recipe = recipe_of("fp32")
        yield
    finally:
        for layer, recipe in zip(layers, before, strict=True):
            layer.recipe = recipe


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Linear) or type(module).__module__ == "lowp.conv1d"


class _Capture:
    """The first input of each layer and the gradient of its output, and whether x has one."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.x: dict[str, Tensor] = {}
        self.dy: dict[str, Tensor] = {}
        self.needs_dx: dict[str, bool] = {}
        self._handles = [
            layer.register_forward_hook(
                lambda module, inputs, y, name=name: self._see(name, inputs[0], y))
            for name, layer in layers.items()
        ]

    def _see(self, name: str, x: Tensor, y: Tensor) -> None:
        if name in self.x:
            return
        self.x[name], self.needs_dx[name] = x.detach().flatten(0, -2), x.requires_grad
        if y.requires_grad:
            y.register_hook(
                lambda dy: self.dy.__setitem__(name, dy.detach().flatten(0, -2)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _pass(model: nn.Module, batch: Any, objective: Objective | None) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = loss_of(model, batch, objective)
        loss.backward()
    return float(loss.detach())


def report(model: nn.Module, batch: Any, objective: Objective | None = None, *,
           optimizer: torch.optim.Optimizer | None = None, lr: float = 1e-3) -> Report:
    """Measure every lowp layer of a model in one forward and backward pass of a batch.

    The batch runs twice with the same random bits: with the model's recipes, and with all layers in
    fp32. Model, gradients, optimizer and clock are as before on return.

    Args:
        model: with lowp layers (:func:`lowp.convert`), in the mode that it is in.
        batch: a mapping (``model(**batch)``), a tuple or list (``model(*batch)``), else the only
            argument; or what ``objective`` takes.
        objective: ``(model, batch)`` to a scalar loss or an object with ``loss``; by default the
            output's ``loss``, or the output.
        optimizer: whose next update is what rounding could lose; without one, the first step of
            Adam with rate ``lr``. fp32 weights are looked at as if they were stored in bf16.

    Returns:
        A :class:`Report`: ``print`` it, ``.to_json()``, ``.draw(path)`` for a heat map.

    Raises:
        ValueError: no lowp layer in the model, or no scalar loss.
    """
    layers = {n: m for n, m in model.named_modules() if _is_linear(m)}
    if not layers:
        raise ValueError("lowp.report: expected a model with lowp layers, got none in "
                         f"{type(model).__name__}; lowp.convert makes them")
    kept = [(p, p.grad) for p in model.parameters()]
    step = clock.step
    capture = _Capture(layers)
    recipes = [m for m in model.modules() if isinstance(m.__dict__.get("recipe"), Recipe)]
    try:
        loss = _pass(model, batch, objective)
        low = {p: p.grad for p in model.parameters()}
        capture.remove()
        moves = {} if optimizer is None else exact_step(optimizer)
        with _all_fp32(recipes):
            loss_fp32 = _pass(model, batch, objective)
        exact: dict[Tensor, Tensor | None] = {p: p.grad for p in model.parameters()}
        for p, grad in low.items():
            p.grad = grad
        rows = [
            _layer(name, layer, capture, exact, moves, optimizer is not None, lr)
            for name, layer in layers.items() if name in capture.x
        ]
    finally:
        capture.remove()
        for p, grad in kept:
            p.grad = grad
        clock.step = step
    update = f"the next step of {type(optimizer).__name__}" if optimizer is not None else \
        f"Adam's first step with rate {lr:g}"
    return Report(rows, loss, loss_fp32, update, _others(model, layers, capture))


def _layer(name: str, layer: Any, capture: _Capture, exact: Mapping[Tensor, Tensor | None],
           moves: Mapping[Tensor, tuple[Tensor, Tensor]], stepped: bool, lr: float) -> LayerReport:
    x, dy = capture.x[name], capture.dy.get(name)
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
    move = moves.get(layer.weight)
    if not stepped and layer.weight.grad is not None:
        move = first_adam_step(layer.weight, lr)
    choices = explain(layer, x)
    dz = dy
    activation = getattr(layer, "activation", "none")
    if dy is not None and activation != "none":  # what the products of the backward get
        with torch.no_grad():
            z = linear(x, weight, layer.bias, "none", layer.recipe)
            dz = activation_grad(dy, z, activation)
    return LayerReport(
        name, layer.recipe.name, (weight.shape[0], weight.shape[1]), x.shape[0],
        operands(x, weight, dz, layer.recipe, layer.noise_id, _ROLES),
        cosine(layer.weight.grad, exact.get(layer.weight)),
        None if move is None else lost_updates(*move, layer.weight.dtype),
        [choice._asdict() for choice in choices],
        None if dy is None else cost(layer, x, dy, capture.needs_dx[name]))


def _others(model: nn.Module, layers: Mapping[str, nn.Module],
            capture: _Capture) -> list[tuple[str, str]]:
    from lowp.convert import plan

    found = [(name, "the batch did not reach it") for name in layers if name not in capture.x]
    found += [
        (entry.fqn, f"not converted: {entry.reason}" if entry.converts else entry.reason)
        for entry in plan(model) if entry.fqn not in layers
    ]
    return found
