"""Device times of every CUDA op against its floor and its peers, in one process, interleaved.

    python -m benchmarks.gpu_timing rows.json

Floors: a copy of as many bytes at the rate of torch.clone measured in the same run, or the
products' work at the rate of torch's own bf16 product. Each candidate is called on buffers that
rotate through more than the L2 cache, between two CUDA events, behind a sleeping kernel that lets
the host run ahead. Ratios are medians of paired rounds: how many times as fast as the peer ours is.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import lowp
from benchmarks.measure import environment
from lowp.ops.accumulate import accumulate
from lowp.ops.activation_grad import activation_grad
from lowp.ops.bias_grad import bias_grad
from lowp.ops.dequantize import dequantize
from lowp.ops.library import OPS
from lowp.ops.linear import linear
from lowp.ops.linear_dgrad import linear_dgrad
from lowp.ops.linear_wgrad import linear_wgrad
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import scaled_mm
from lowp.ops.square_sums import square_sums
from lowp.reference.activation import derivative
from tests import update_cases
from tests.targets import REFERENCE, Target
from tests.test_matrix_optim_ops import adafactor_case, exact_muon_case
from tests.tolerances import gradient_bound, product_bound

ROUNDS, BUFFERS = 30, 4
SIZE = 8192  # 128 MiB of bf16: beyond the L2 cache
BF16 = torch.bfloat16
Call = Callable[[int], object]  # takes the number of the buffer


class Case(NamedTuple):
    """What is timed: ours, its peers, the floor's work, and the gate that is passed first."""

    op: str
    ours: Call
    peers: dict[str, Call]
    bytes: int
    flop: int
    gate: Callable[[], bool]


def interleaved(candidates: dict[str, Call]) -> dict[str, list[float]]:
    """Seconds of every candidate, one call of each a round, in turning order."""
    for call in candidates.values():
        for i in range(3):
            call(i % BUFFERS)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(ROUNDS):
        names = list(candidates) if index % 2 == 0 else list(reversed(candidates))
        marks = {}
        torch.cuda._sleep(2_000_000)
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            candidates[name](index % BUFFERS)
            end.record()
            marks[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in marks.items():
            times[name].append(start.elapsed_time(end) / 1e3)
    return times


def copies(make: Callable[[], Any]) -> list[Any]:
    return [make() for _ in range(BUFFERS)]


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def equals_reference(op: str, *args: Any) -> bool:
    """Whether the kernel's results have the reference's bits."""
    got, want = OPS[op](*args), OPS[op].kernels["reference"](*[
        a.cpu() if isinstance(a, Tensor) else a for a in args])
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
    return all(torch.equal(a.cpu(), b) for a, b in pairs)


def eager_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def memory_bound() -> Iterator[Case]:
    xs, small = copies(lambda: random(SIZE, SIZE)), random(130, 1040)
    numel = SIZE * SIZE
    compiled = torch.compile(eager_codes)
    for rounding in ("nearest", "stochastic"):
        for granularity, traffic in (("row", 3), ("block", 3), ("column", 5), ("tensor", 5)):
            options = (granularity, 128, rounding, 0, None, 0, 4, 0)
            peers: dict[str, Call] = {}
            if granularity == "row" and rounding == "nearest":
                peers = {"eager": lambda i: eager_codes(xs[i]),
                         "compile": lambda i: compiled(xs[i])}
            yield Case(f"quantize {granularity} {rounding}",
                       lambda i, o=options: quantize(xs[i], *o), peers, traffic * numel, 0,
                       lambda o=options: equals_reference("quantize", small, *o))
        both = (rounding, 0, None, 0, 6, 7, 0)
        yield Case(f"quantize_row_col {rounding}",
                   lambda i, o=both: quantize_row_col(xs[i], *o), {}, 6 * numel, 0,
                   lambda o=both: equals_reference("quantize_row_col", small, *o))
    quantized = copies(lambda: (codes(SIZE, SIZE), torch.rand(SIZE, 1, device="cuda")))
    yield Case("dequantize row", lambda i: dequantize(*quantized[i], "row", 0, BF16),
               {"eager": lambda i: (quantized[i][0] * quantized[i][1]).to(BF16)}, 3 * numel, 0,
               lambda: equals_reference("dequantize", codes(7, 300),
                                        torch.rand(7, 1, device="cuda"), "row", 0, BF16))
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield Case(f"activation_grad {activation}",
                   lambda i, a=activation: activation_grad(xs[i], xs[(i + 1) % BUFFERS], a), {},
                   6 * numel, 0,
                   lambda a=activation: equals_reference("activation_grad", small, small, a))
    yield Case("bias_grad", lambda i: bias_grad(xs[i]), {"torch sum": lambda i: xs[i].sum(0)},
               2 * numel, 0, lambda: equals_reference("bias_grad", small))


def optimizer(cls: type[Any], p: Tensor, **options: Any) -> Callable[[], Any]:
    q = p.clone().requires_grad_()
    q.grad = torch.randn_like(q)
    opt = cls([q], lr=1e-3, **options)
    opt.step()
    return opt.step  # type: ignore[no-any-return]


def updates() -> Iterator[Case]:
    p = random(SIZE, SIZE)
    small = torch.randn(300, device="cuda")

    def gate() -> bool:
        a, b = (small.clone().requires_grad_() for _ in range(2))
        a.grad = b.grad = small.cos()
        lowp.optim.AdamW([a]).step()
        torch.optim.AdamW([b]).step()
        return torch.allclose(a, b, rtol=1e-6, atol=1e-7)

    for states, traffic in ((None, 14), ("fp32", 22), ("int8", 10)):
        step = optimizer(lowp.optim.AdamW, p, state_dtype=states)
        torch_step = optimizer(torch.optim.AdamW, p, fused=True)
        peers: dict[str, Call] = {"torch fused bf16": lambda i, s=torch_step: s()}
        if states == "int8":
            for label in ("torchao", "bitsandbytes"):
                try:
                    other = optimizer(importlib.import_module(f"{label}.optim").AdamW8bit, p)
                except Exception as error:
                    print(f"{label} is left out: {error}")
                else:
                    peers[label] = lambda i, s=other: s()
        yield Case(f"AdamW bf16, states {states or 'bf16'}", lambda i, s=step: s(), peers,
                   traffic * p.numel(), 0, gate)
        del step, torch_step, peers
        torch.cuda.empty_cache()


def updates_equal(op: str, case: dict[str, Any]) -> bool:
    """Whether the kernel leaves the reference's bits in every tensor that it writes."""
    try:
        update_cases.assert_equal(Target("cuda", "cuda"), OPS[op], case)
    except AssertionError:
        return False
    return True


def more_updates() -> Iterator[Case]:
    """The optimizers with one moment or none, Muon, sums and additions of gradients."""
    p, shapes = random(SIZE, SIZE), ((130, 1040), (300,))
    params, grads = ([torch.randn(shape).bfloat16() for shape in shapes] for _ in range(2))
    cases: dict[str, dict[str, Any]] = {
        "SGD": update_cases.sgd_case(params, grads, BF16),
        "Lion": update_cases.lion_case(params, grads, BF16),
        "Adafactor": adafactor_case(params, grads),
    }
    peers: dict[str, dict[str, Call]] = {name: {} for name in cases}
    for name, options in (("SGD", {"momentum": 0.9, "fused": True}), ("Adafactor", {})):
        other = optimizer(getattr(torch.optim, name), p, **options)
        peers[name] = {"torch": lambda i, s=other: s()}
    for name, traffic in (("SGD", 10), ("Lion", 10), ("Adafactor", 6)):
        step = optimizer(getattr(lowp.optim, name), p,
                         **({"momentum": 0.9} if name == "SGD" else {}))
        yield Case(f"{name} bf16", lambda i, s=step: s(), peers.pop(name), traffic * p.numel(), 0,
                   lambda n=name: updates_equal(n.lower(), cases[n]))
    square = random(SIZE // 2, SIZE // 2)
    ours, other = (optimizer(library.Muon, square) for library in (lowp.optim, torch.optim))
    yield Case("Muon bf16", lambda i: ours(), {"torch": lambda i: other()}, 10 * square.numel(),
               5 * 3 * 2 * len(square)**3,  # five steps of three products
               lambda: updates_equal("muon", exact_muon_case(shapes[:1], BF16, BF16)))
    xs, ys = (copies(lambda: random(SIZE, SIZE)) for _ in range(2))
    step = torch.ones((), dtype=torch.int64, device="cuda")
    yield Case("accumulate bf16",
               lambda i: accumulate([xs[i]], [ys[i]], "stochastic", 0, step, 1, [0], [0]),
               {"torch add_": lambda i: xs[i].add_(ys[i])}, 6 * p.numel(), 0,
               lambda: updates_equal("accumulate", update_cases.accumulate_case(
                   params, grads, "stochastic")))
    yield Case("square_sums bf16", lambda i: square_sums([xs[i]]),
               {"torch norm": lambda i: torch.linalg.vector_norm(xs[i], dtype=torch.float32)},
               2 * p.numel(), 0, lambda: torch.equal(square_sums([params[0].cuda()]).cpu(),
                                                     REFERENCE.run(square_sums, [params[0]])))


def product_gate(depth: int) -> bool:
    x, w = random(256, depth), random(384, depth)
    exact = x.double() @ w.double().t()
    bound = product_bound(x, w, None, BF16)
    error = linear(x, w, None, "none", BF16, False)[0].double() - exact
    return bool((error.abs() <= bound).all())


def gradient_gate(depth: int) -> bool:
    dy, w, preact = random(256, depth), random(depth, 384), random(256, 384)
    factor = derivative(preact.float(), "gelu")
    bound = gradient_bound(dy, w.t(), factor, BF16)
    exact = factor.double() * (dy.double() @ w.double())
    error = linear_dgrad(dy, w, preact, "gelu", BF16).double() - exact
    return bool((error.abs() <= bound).all())


def products() -> Iterator[Case]:
    for m, n, k in ((16, 4096, 4096), (2048, 4096, 1024), (4096, 4096, 4096), (8192, 8192, 8192),
                    (16384, 4096, 4096)):
        label, flop = f"{m}x{n}x{k}", 2 * m * n * k
        sets = copies(lambda m=m, n=n, k=k: (random(m, k), random(n, k), random(m, n), random(n)))
        check = functools.partial(product_gate, k)
        yield Case(f"linear {label}",
                   lambda i, s=sets: linear(*s[i][:2], s[i][3], "none", BF16, False),
                   {"F.linear": lambda i, s=sets: functional.linear(*s[i][:2], s[i][3])}, 0, flop,
                   check)
        yield Case(f"linear gelu, pre-activation kept {label}",
                   lambda i, s=sets: linear(*s[i][:2], s[i][3], "gelu", BF16, True),
                   {"F.linear + gelu": lambda i, s=sets: functional.gelu(
                       functional.linear(*s[i][:2], s[i][3]))}, 0, flop, check)
        yield Case(f"linear_dgrad {label}",
                   lambda i, s=sets: linear_dgrad(s[i][2], s[i][1], None, "none", BF16),
                   {"torch": lambda i, s=sets: s[i][2] @ s[i][1]}, 0, flop, check)
        yield Case(f"linear_dgrad gelu {label}",
                   lambda i, s=sets: linear_dgrad(s[i][2], s[i][1], s[i][0], "gelu", BF16),
                   {"torch + gelu_backward": lambda i, s=sets: torch.ops.aten.gelu_backward(
                       s[i][2] @ s[i][1], s[i][0])}, 0, flop,
                   functools.partial(gradient_gate, k))
        yield Case(f"linear_wgrad {label}",
                   lambda i, s=sets: linear_wgrad(s[i][2], s[i][0], True, BF16),
                   {"torch": lambda i, s=sets: (s[i][2].t() @ s[i][0], s[i][2].sum(0)),
                    "without bias": lambda i, s=sets: linear_wgrad(s[i][2], s[i][0], False, BF16)},
                   0, flop, check)
        ints = copies(lambda m=m, n=n, k=k: (codes(m, k), codes(n, k), torch.rand(m, device="cuda"),
                                             torch.rand(n, device="cuda")))
        peers: dict[str, Call] = {
            "F.linear bf16": lambda i, s=sets: functional.linear(*s[i][:2]),
        }
        if m > 16:
            peers["_int_mm"] = lambda i, s=ints: torch._int_mm(s[i][0], s[i][1].t())
        if torch.cuda.get_device_capability() >= (8, 9):
            eights = copies(lambda m=m, n=n, k=k: (random(m, k).to(torch.float8_e4m3fn),
                                                   random(n, k).to(torch.float8_e4m3fn)))
            one = torch.ones((), device="cuda")
            peers["_scaled_mm fp8"] = lambda i, s=eights, o=one: torch._scaled_mm(
                s[i][0], s[i][1].t(), scale_a=o, scale_b=o, out_dtype=BF16)
        yield Case(f"scaled_mm {label}",
                   lambda i, s=ints: scaled_mm(*s[i], None, "none", BF16, False), peers, 0, flop,
                   lambda: equals_reference("scaled_mm", codes(130, 256), codes(72, 256),
                                            torch.rand(130, device="cuda"),
                                            torch.rand(72, device="cuda"), None, "none", BF16,
                                            False))
        del sets, ints, peers
        torch.cuda.empty_cache()


def rates() -> dict[str, float]:
    """What this device reaches here and now: a copy's bytes and torch's product's FLOP a second."""
    xs = copies(lambda: random(SIZE, SIZE))
    times = interleaved({"clone": lambda i: xs[i].clone(), "product": lambda i: xs[i] @ xs[i]})
    return {"clone bytes/s": 4 * SIZE**2 / median(times["clone"]),
            "product FLOP/s": 2 * SIZE**3 / median(times["product"])}


def row_of(case: Case, rate: dict[str, float]) -> dict[str, Any]:
    """One line of the result; a wrong kernel is not timed."""
    if not case.gate():
        return {"op": case.op, "refused": "the kernel is wrong here; it is not timed"}
    times = interleaved({"lowp": case.ours, **case.peers})
    ours = median(times["lowp"])
    floor = case.bytes / rate["clone bytes/s"] + case.flop / rate["product FLOP/s"]
    ratios = {name: median(theirs / mine for theirs, mine in zip(taken, times["lowp"], strict=True))
              for name, taken in times.items() if name != "lowp"}
    return {"op": case.op, "microseconds": ours * 1e6, "of floor": floor / ours, "ratios": ratios}


def main() -> None:
    """Time everything; the file is written anew after every row, so what was reached is kept."""
    path = Path(sys.argv[1])
    with lowp.backend("cuda"):
        rate = rates()
        found: dict[str, Any] = {
            "environment": {**environment(), "gpu": torch.cuda.get_device_name(),
                            "cuda": torch.version.cuda}, "rates": rate, "rows": [],
        }
        failed = False
        for group in (memory_bound, updates, more_updates, products):
            for case in group():
                found["rows"].append(row_of(case, rate))
                failed |= "refused" in found["rows"][-1]
                path.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
