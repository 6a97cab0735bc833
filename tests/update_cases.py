"""Arguments of adamw, sgd and lion; the comparison of any backend's update with the reference."""

from __future__ import annotations

import torch

import lowp
from lowp.ops.adamw import adamw
from lowp.ops.lion import lion
from lowp.ops.sgd import sgd
from tests.targets import REFERENCE, Target, moved
from tests.tensors import FLOATS, same_bits
from tests.updates import cloned, state_like

STATES = (*FLOATS, "int8")


def rest(count, rounding):
    """The arguments with which every update ends, in their order."""
    return {
        "maximize": False, "rounding": rounding, "state_rounding": rounding, "seed": 11,
        "tensors": list(range(7, 7 + count)), "offsets": [13 * i for i in range(count)],
        "grad_scale": None, "found_inf": None,
    }


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
        "weight_decay": 0.1, "eps": 1e-8, **rest(len(params), rounding), **options,
    }


def sgd_case(params, grads, kind, rounding="stochastic", **options):
    torch.manual_seed(5)
    pairs = [state_like(p, kind, torch.int8) for p in params]
    return {
        "params": params, "grads": grads, "momentum_buffers": [m for m, _ in pairs],
        "momentum_scales": [s for _, s in pairs],
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "lr": torch.tensor(3e-2, dtype=torch.float64), "momentum": 0.9, "dampening": 0.25,
        "weight_decay": 0.1, "nesterov": False, **rest(len(params), rounding), **options,
    }


def lion_case(params, grads, kind, rounding="stochastic", **options):
    torch.manual_seed(5)
    pairs = [state_like(p, kind, torch.int8) for p in params]
    return {
        "params": params, "grads": grads, "exp_avgs": [m for m, _ in pairs],
        "exp_avg_scales": [s for _, s in pairs],
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "lr": torch.tensor(3e-3, dtype=torch.float64), "beta1": 0.9, "beta2": 0.99,
        "weight_decay": 0.1, **rest(len(params), rounding), **options,
    }


def accumulate_case(totals, grads, rounding, **options):
    count = len(totals)
    return {
        "totals": totals, "grads": grads, "rounding": rounding, "seed": 7, "step": torch.tensor(3),
        "addition": 2, "tensors": list(range(7, 7 + count)),
        "offsets": [13 * i for i in range(count)], **options,
    }


OPS = {"adamw": (adamw, adamw_case), "sgd": (sgd, sgd_case), "lion": (lion, lion_case)}


def still_case(name: str) -> dict:
    """A step that moves nothing, of bf16 weights with every remainder: also with -2^15, halfway to
    the bf16 value below, which belongs to the one above."""
    params = [torch.randn(256, 256).bfloat16()]
    still = {"lr": torch.tensor(0.0, dtype=torch.float64), "weight_decay": 0.0}
    case = OPS[name][1](params, [torch.randn(256, 256)], torch.bfloat16, **still)
    coupled = {"coupled": False} if name == "adamw" else {}  # it comes before the masters
    return {**case, **coupled, "masters": [torch.arange(2**16).to(torch.int16).view(256, 256)]}


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
