"""Arguments of the optimizer ops, and their comparison with the reference."""

from __future__ import annotations

import torch

import lowp
from lowp.ops.adamw import adamw
from lowp.ops.sgd import sgd
from lowp.ops.update import scale_shape
from tests.targets import REFERENCE, Target, moved
from tests.tensors import FLOATS, same_bits

STATES = (*FLOATS, "int8")
EMPTY = torch.empty(0)


def state_like(p: torch.Tensor, kind, codes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A plausible state of any type: codes of every value, or floats (squares where unsigned)."""
    if kind == "int8":
        low = 0 if codes == torch.uint8 else -127
        high = 256 if codes == torch.uint8 else 128
        return torch.randint(low, high, p.shape, dtype=codes), torch.rand(scale_shape(p))
    x = torch.randn(p.shape)
    return (x.square() if codes == torch.uint8 else x).to(kind), EMPTY


def adamw_case(params, grads, kind, rounding="stochastic", amsgrad=False, **options):
    torch.manual_seed(5)
    pairs = [(state_like(p, kind, torch.int8), state_like(p, kind, torch.uint8)) for p in params]
    floats = torch.float32 if kind == "int8" else kind
    return {
        "params": params, "grads": grads, "exp_avgs": [m for (m, _), _ in pairs],
        "exp_avg_sqs": [v for _, (v, _) in pairs], "exp_avg_scales": [s for (_, s), _ in pairs],
        "exp_avg_sq_scales": [s for _, (_, s) in pairs],
        "max_exp_avg_sqs": [torch.rand(p.shape).to(floats) for p in params] if amsgrad else [],
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "lr": torch.tensor(3e-2, dtype=torch.float64), "beta1": 0.9, "beta2": 0.99,
        "weight_decay": 0.1, "eps": 1e-8, "maximize": False, "rounding": rounding,
        "state_rounding": rounding, "seed": 11, "tensors": list(range(7, 7 + len(params))),
        "offsets": [13 * i for i in range(len(params))], "grad_scale": None, "found_inf": None,
        **options,
    }


def sgd_case(params, grads, kind, rounding="stochastic", **options):
    torch.manual_seed(5)
    pairs = [state_like(p, kind, torch.int8) for p in params]
    return {
        "params": params, "grads": grads, "momentum_buffers": [m for m, _ in pairs],
        "momentum_scales": [s for _, s in pairs],
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "lr": torch.tensor(3e-2, dtype=torch.float64), "momentum": 0.9, "dampening": 0.25,
        "weight_decay": 0.1, "nesterov": False, "maximize": False, "rounding": rounding,
        "state_rounding": rounding, "seed": 11, "tensors": list(range(7, 7 + len(params))),
        "offsets": [13 * i for i in range(len(params))], "grad_scale": None, "found_inf": None,
        **options,
    }


OPS = {"adamw": (adamw, adamw_case), "sgd": (sgd, sgd_case)}


def cloned(case: dict) -> dict:
    """Every tensor copied with its strides."""
    def copy(t):
        if not isinstance(t, torch.Tensor) or 0 in t.stride():  # an expanded gradient is only read
            return t
        other = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return other.copy_(t)

    return {k: [copy(t) for t in v] if isinstance(v, list) else copy(v) for k, v in case.items()}


def run(target: Target, op, case: dict) -> dict:
    """The case after the update, on copies, on the CPU."""
    work = cloned(case)
    if target.device != "cpu":
        work = dict(zip(work, moved(list(work.values()), target.device), strict=True))
    with lowp.backend(target.backend):
        op(*work.values())
    return dict(zip(work, moved(list(work.values()), "cpu"), strict=True))


def assert_equal(target: Target, op, case: dict) -> dict:
    """Every tensor that the kernel writes must agree with the reference. Gives its copies."""
    kernel, truth = run(target, op, case), run(REFERENCE, op, case)
    for key, want in truth.items():
        if isinstance(want, list) and want and isinstance(want[0], torch.Tensor):
            for got, exact in zip(kernel[key], want, strict=True):
                assert same_bits(got, exact), key
    return kernel
