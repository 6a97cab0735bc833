"""Arguments of the optimizers' ops: states and masters of any type, copies, and both backends."""

from __future__ import annotations

import torch

import lowp
from lowp.ops.update import scale_shape
from tests.tensors import same_bits

EMPTY = torch.empty(0)


def state_like(p: torch.Tensor, kind, codes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A plausible state of any type: codes of every value, or floats (squares where unsigned)."""
    if kind == "int8":
        low = 0 if codes == torch.uint8 else -127
        high = 256 if codes == torch.uint8 else 128
        return torch.randint(low, high, p.shape, dtype=codes), torch.rand(scale_shape(p))
    x = torch.randn(p.shape)
    return (x.square() if codes == torch.uint8 else x).to(kind), EMPTY


def masters_of(params, kind: str) -> list[torch.Tensor]:
    """Any low bits, or rounding errors of at most half an ulp; nothing for fp32 params."""
    def master(p):
        if p.dtype == torch.float32 or (kind == "remainder" and p.dtype == torch.float16):
            return EMPTY
        if kind == "remainder":
            return torch.randint(-(2**15), 2**15, p.shape, dtype=torch.int16)
        return ((torch.rand(p.shape) - 0.5) * 2.0**-8 * p.float()).to(p.dtype)

    return [master(p) for p in params]


def cloned(case: dict) -> dict:
    """Every tensor copied with its strides."""
    def copy(t):
        if not isinstance(t, torch.Tensor) or 0 in t.stride():  # an expanded gradient is only read
            return t
        other = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return other.copy_(t)

    return {k: [copy(t) for t in v] if isinstance(v, list) else copy(v) for k, v in case.items()}


def assert_equal(op, case: dict) -> dict:
    """Runs both backends on copies; every written tensor must agree. Gives the kernel's copies."""
    kernel, truth = cloned(case), cloned(case)
    with lowp.backend("cpu"):
        op(*kernel.values())
    with lowp.backend("reference"):
        op(*truth.values())
    for key, want in truth.items():
        if isinstance(want, list) and want and isinstance(want[0], torch.Tensor):
            for got, exact in zip(kernel[key], want, strict=True):
                assert same_bits(got, exact), key
    return kernel
