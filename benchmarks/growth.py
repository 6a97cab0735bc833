"""How cost grows: products, quantization, a layer and AdamW by size and by threads, beside torch's.

    python -m benchmarks.growth

Matrices are n x n, n from 16 to 4096; AdamW updates 1 to 1000 tensors of 16k elements. Each op is
checked against its reference or bound first. A peer that is about to take longer than 1.5 s a
call is left out from there on, as are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import lowp
from benchmarks.measure import RESULTS, Candidates, interleaved, record, with_ratios
from benchmarks.quantize import eager
from benchmarks.quantize import least_work as quantize_work
from benchmarks.roofline import DRAW, Work, product, sample
from lowp.hybrid.curves import save_figure
from lowp.ops.linear import linear
from lowp.ops.quantize import quantize
from lowp.ops.scaled_mm import scaled_mm
from tests.tolerances import RECIPE_ERROR, product_bound

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COUNTS = (1, 3, 10, 30, 100, 300, 1000)
ELEMENTS = 16384
TOKENS = 64
LONGEST = 1.5  # seconds of a call
BUDGET = 1.5  # seconds of all calls at one size


class Point(NamedTuple):
    """A size of one series: lowp's call, torch's, the least work of it, and the check."""

    lowp: Callable[[], object]
    torch: Callable[[], object]
    work: Work
    check: Callable[[], bool]


def linear_point(n: int, dtype: torch.dtype) -> Point:
    """x wᵀ + b."""
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((n, n), (n, n), (n,)))

    def check() -> bool:
        got = linear(x, w, b, "none", dtype, False)[0].double()
        exact = x.double() @ w.double().t() + b.double()
        return bool(((got - exact).abs() <= product_bound(x, w, b, dtype)).all())

    return Point(lambda: linear(x, w, b, "none", dtype, False),
                 lambda: functional.linear(x, w, b), product(n, n, n, dtype), check)


def scaled_mm_point(n: int) -> Point:
    """int8 codes, scales and a bias to bf16; torch._int_mm and the rest in eager."""
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
    rows, cols, bias = torch.rand(n), torch.rand(n), torch.randn(n)
    arguments = a, b, rows, cols, bias, "none", torch.bfloat16, False

    def check() -> bool:
        with lowp.backend("reference"):
            want = scaled_mm(*arguments)[0]
        return torch.equal(scaled_mm(*arguments)[0], want)

    def plain() -> Tensor:
        return (torch._int_mm(a, b.t()).float() * rows[:, None] * cols + bias).bfloat16()

    return Point(lambda: scaled_mm(*arguments), plain,
                 product(n, n, n, torch.int8, torch.bfloat16), check)


def quantize_point(n: int) -> Point:
    """bf16 rows, stochastic."""
    x = torch.randn(n, n).bfloat16()
    arguments = x, "row", 0, "stochastic", 0, None, 0, 4, 0

    def check() -> bool:
        with lowp.backend("reference"):
            want = quantize(*arguments)
        return all(map(torch.equal, quantize(*arguments), want))

    return Point(lambda: quantize(*arguments), lambda: eager(x, -1, True),
                 quantize_work(x, 1, "stochastic"), check)


def layer_point(n: int) -> Point:
    """A forward call of an int8 layer on 64 tokens, its weight quantized each time."""
    layer, plain = lowp.Linear(n, n, precision="int8"), nn.Linear(n, n)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(TOKENS, n)

    def without_grad(module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return module(x)
        return run

    ours, theirs = without_grad(layer), without_grad(plain)
    nbytes = 4 * (2 * TOKENS * n + n * n)
    return Point(ours, theirs, Work(nbytes, product(TOKENS, n, n, torch.int8).operations),
                 lambda: bool((ours() - theirs()).norm() < RECIPE_ERROR["int8"] * theirs().norm()))


def adamw_point(count: int) -> Point:
    """bf16 weights and states, stochastic; torch's fused one to nearest."""
    values, grads = (torch.randn(count, ELEMENTS).bfloat16() for _ in range(2))

    def of(kind: Any, **options: Any) -> tuple[Any, list[Tensor]]:
        params = [v.clone().requires_grad_() for v in values]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return kind(params, **options), params

    ours, params = of(lowp.optim.AdamW)
    theirs, _ = of(torch.optim.AdamW, fused=True)

    def check() -> bool:
        again, same = of(lowp.optim.AdamW)
        with lowp.backend("reference"):
            again.step()
        ours.step()
        return all(map(torch.equal, params, same))

    numel = values.numel()
    return Point(ours.step, theirs.step,
                 Work(14 * numel, {"roots": numel, "wide_products": 3 * numel * DRAW}), check)


SERIES: dict[str, tuple[Callable[[int], Point], tuple[int, ...], int]] = {
    "linear fp32": (lambda n: linear_point(n, torch.float32), SIZES, 3),
    "linear fp16": (lambda n: linear_point(n, torch.float16), SIZES, 3),
    "linear bf16": (lambda n: linear_point(n, torch.bfloat16), SIZES, 3),
    "scaled_mm": (scaled_mm_point, SIZES, 3),
    "quantize": (quantize_point, SIZES, 2),
    "int8 layer, 64 tokens": (layer_point, SIZES, 2),
    "AdamW, tensors of 16k": (adamw_point, COUNTS, 1),
}
"""Of each its points, their sizes, and the power of the size that its cost grows with."""
CHECKED = 256


@torch.no_grad()  # as inside a layer's autograd function
def measure(name: str, threads: int) -> list[dict[str, Any]]:
    """The rows of a series, from small to large."""
    point_of, sizes, power = SERIES[name]
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    last: dict[str, float] = {}
    for index, size in enumerate(sizes):
        point = point_of(size)
        assert size > CHECKED or point.check(), (name, size, threads)
        growth = (size / sizes[index - 1]) ** power if index else 1.0
        expected = {who: growth * last[who] if index else 0.0 for who in last or ("lowp", "torch")}
        calls: Candidates = {who: getattr(point, who) for who, seconds in expected.items()
                             if seconds < LONGEST}
        if "lowp" not in calls:
            break
        rounds = int(BUDGET / max(1e-9, sum(expected[who] for who in calls)))
        last = interleaved(calls, rounds=min(max(rounds, 3), 30), warmup=1)
        rows.append({"series": name, "size": size, "threads": threads,
                     **with_ratios(last, "lowp"), "work": sample(point.work)})
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel a series: seconds by size; torch's dashed, the bound dotted."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    *panels, last = figure.subplots(2, 4).flat
    for panel, name in zip(panels, SERIES, strict=True):
        for threads, color in ((1, "C0"), (2, "C1")):
            found = [row for row in rows if (row["series"], row["threads"]) == (name, threads)]
            for key, style, label in (("lowp [s]", "-", "lowp"), ("torch [s]", "--", "torch"),
                                      ("bound [s]", ":", "bound")):
                known = [row for row in found if key in row]
                panel.plot([row["size"] for row in known], [row[key] for row in known], style,
                           color=color, label=f"{label}, {threads} thread" + "s" * (threads > 1))
        panel.set(xscale="log", yscale="log", title=name,
                  xlabel="tensors" if name.startswith("AdamW") else "n", ylabel="s")
    last.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    last.legend(handles, labels, frameon=False, loc="center")
    return figure


def main() -> None:
    """Measure every series on one thread and on two, and write the table and the plot."""
    torch.manual_seed(0)
    rows = []
    for name in SERIES:
        for threads in (1, 2):
            rows.extend(measure(name, threads))
            print(name, threads, rows[-1], flush=True)
    record("growth", rows)
    save_figure(draw(rows), RESULTS / "growth.png")


if __name__ == "__main__":
    main()
