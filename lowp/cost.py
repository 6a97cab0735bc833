"""Time and bytes of one linear layer: as the machine's rates predict, and as measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowp.linear import linear
from lowp.quantized import quantize
from lowp.recipe import Recipe

PROBE = (256, 512, 512)  # M, N, K of the products that the rates are taken from


class Cost(NamedTuple):
    """Bytes that one layer holds, and seconds of one forward and backward pass.

    Attributes:
        weight, gradient: bytes of weight and bias, and of their gradients.
        saved: bytes that the forward pass keeps for the backward, beside the parameters.
        predicted: seconds, from the rates of this machine's products at one probed shape.
        measured: seconds, median of several passes of the layer alone.
    """

    weight: int
    gradient: int
    saved: int
    predicted: float
    measured: float


def _seconds(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds of a call."""
    found = []
    for index in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index:  # the first call warms up
            found.append(time.perf_counter() - start)
    return median(found)


def _values(rows: int, cols: int, device: torch.device) -> Tensor:
    """Gaussian values that leave torch's generators alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, cols, generator=generator).to(device)


@functools.lru_cache(maxsize=64)
def _rate(precision: str, dtype: torch.dtype, device: torch.device, threads: int,
          ) -> tuple[float, float]:
    """(seconds a multiply-add, seconds a call) of products of one precision.

    Two shapes, the probe's and one of 8 × 8 × 8, tell slope and offset.
    """
    recipe = Recipe(precision, precision, precision)
    found = []
    for m, n, k in (PROBE, (8, 8, 8)):
        x, w = _values(m, k, device).to(dtype), _values(n, k, device).to(dtype)
        run = functools.partial(linear, x, w, None, "none", recipe)
        with torch.no_grad():
            found.append(_seconds(run, 5, device))
    count = PROBE[0] * PROBE[1] * PROBE[2]
    return max(found[0] - found[1], 0.0) / count, found[1]


@functools.lru_cache(maxsize=8)
def _quantize_rate(device: torch.device, threads: int) -> float:
    """Seconds an element of quantizing by row."""
    x = _values(512, 1024, device)
    return _seconds(lambda: quantize(x), 5, device) / x.numel()


def predicted(m: int, n: int, k: int, recipe: Recipe, dtype: torch.dtype, device: torch.device,
              needs_dx: bool) -> float:
    """Seconds of the three products of x [M, K] and w [N, K], or two without dx."""
    threads = torch.get_num_threads()
    total = 0.0
    for field in ("output", "grad_input", "grad_weight"):
        if field == "grad_input" and not needs_dx:
            continue
        product = recipe.product(field)
        slope, offset = _rate(product.precision, dtype, device, threads)
        total += offset + slope * m * n * k
        if product.is_int8 and field != "output":  # the output's is in its probe
            extra = m * n + (n * k if field == "grad_input" else m * k)
            total += _quantize_rate(device, threads) * extra
    return total


def cost(layer: Any, x: Tensor, dy: Tensor, needs_dx: bool) -> Cost:
    """What a layer holds and takes, run alone on its own input and gradient.

    Args:
        layer: a lowp layer; its gradients are as before on return.
        x: [M, K]. dy: [M, N].
        needs_dx: whether anything before it needs a gradient.
    """
    own = [p for p in layer.parameters(recurse=False)]
    held = [p.grad for p in own]
    leaf = x.detach().clone().requires_grad_(needs_dx)
    inside = {p.untyped_storage().data_ptr() for p in own}
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in inside:
            saved[place] = max(saved.get(place, 0), t.numel() * t.element_size())
        return t

    def once() -> None:
        y = layer.forward(leaf)
        if y.requires_grad:
            torch.autograd.backward(y, dy)

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            once()
        measured = _seconds(once, 5, x.device)
    for p, grad in zip(own, held, strict=True):
        p.grad = grad
    trained = sum(p.numel() * p.element_size() for p in own if p.requires_grad)
    (m, k), n = x.shape, dy.shape[1]
    return Cost(sum(p.numel() * p.element_size() for p in own), trained, sum(saved.values()),
                predicted(m, n, k, layer.recipe, x.dtype, x.device, needs_dx), measured)
