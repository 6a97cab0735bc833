"""The launches that benchmarks/compiled.py compiles: every op, in the shapes and types of a real model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowp.ops.library import OPS

Case = Callable[[], object]

TOKENS, FEATURES = 256, 4096  # tokens are no part of what is compiled (tests/test_compiled.py)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEP = torch.tensor(3)


def _run(op: str, *arguments: object) -> object:
    return OPS[op].kernels["triton"](*arguments)


def _x(dtype: torch.dtype = BF16, cols: int = FEATURES) -> torch.Tensor:
    return torch.empty(TOKENS, cols, dtype=dtype)


def _quantize(granularity: str, rounding: str, dtype: torch.dtype = BF16,
              cols: int = FEATURES) -> Case:
    return lambda: _run("quantize", _x(dtype, cols), granularity, 128, rounding, 1, STEP, 2, 4, 0)


def _dequantize(granularity: str, out: torch.dtype) -> Case:
    shapes = {"tensor": (), "row": (TOKENS, 1), "column": (FEATURES,),
              "block": (TOKENS, FEATURES // 128)}
    return lambda: _run("dequantize", _x(torch.int8), torch.empty(shapes[granularity]), granularity,
                        128, out)


CASES: dict[str, Case] = {
    **{f"quantize {g} {r} bf16": _quantize(g, r)
       for g in ("tensor", "row", "column", "block") for r in ("nearest", "stochastic")},
    "quantize row stochastic fp32": _quantize("row", "stochastic", FP32),
    "quantize row stochastic fp16": _quantize("row", "stochastic", FP16),
    "quantize row stochastic bf16, 301 columns": _quantize("row", "stochastic", cols=301),
    "quantize row stochastic bf16, 32768 columns": _quantize("row", "stochastic", cols=32768),
    **{f"quantize_row_col {r} bf16": lambda r=r: _run(
        "quantize_row_col", _x(), r, 1, STEP, 2, 6, 7, 0) for r in ("nearest", "stochastic")},
    **{f"dequantize {g} bf16": _dequantize(g, BF16) for g in ("tensor", "row", "column", "block")},
    "dequantize row fp32": _dequantize("row", FP32),
    **{f"activation_grad {a} bf16": lambda a=a: _run("activation_grad", _x(), _x(), a)
       for a in ("relu", "gelu", "gelu_tanh", "silu")},
    "bias_grad bf16": lambda: _run("bias_grad", _x()),
}
