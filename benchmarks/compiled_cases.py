"""The launches that benchmarks/compiled.py compiles: every op, in a real model's shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowp.ops.library import OPS

Case = Callable[[], object]

# tokens are no part of what is compiled (tests/test_compiled_kernels.py)
TOKENS, FEATURES = 256, 4096
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


def _linear(dtype: torch.dtype, activation: str, tokens: int = 8192, cols: int = FEATURES) -> Case:
    def run() -> object:
        x, w = torch.empty(tokens, cols, dtype=dtype), torch.empty(FEATURES, cols, dtype=dtype)
        saved = activation != "none"
        return _run("linear", x, w, torch.empty(FEATURES, dtype=dtype), activation, dtype, saved)

    return run


def _gradients(dtype: torch.dtype) -> Case:
    def run() -> object:
        dy = torch.empty(8192, FEATURES, dtype=dtype)
        w = torch.empty(FEATURES, FEATURES, dtype=dtype)
        _run("linear_dgrad", dy, w, None, "none", dtype)
        return _run("linear_wgrad", dy, dy, True, FP32)

    return run


def _dgrad(dtype: torch.dtype, activation: str) -> Case:
    def run() -> object:
        dy = torch.empty(8192, FEATURES, dtype=dtype)
        w = torch.empty(FEATURES, FEATURES, dtype=dtype)
        return _run("linear_dgrad", dy, w, torch.empty_like(dy), activation, dtype)

    return run


def _scaled_mm(activation: str, tokens: int = 8192) -> Case:
    def run() -> object:
        a, b = torch.empty(tokens, FEATURES, dtype=torch.int8), _x(torch.int8).new_empty(4096, 4096)
        return _run("scaled_mm", a, b, torch.empty(tokens), torch.empty(4096), torch.empty(4096),
                    activation, BF16, False)

    return run


def _state(state: torch.dtype | str, codes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if state == "int8":
        return _x(codes), torch.empty(TOKENS, FEATURES // 256)
    return _x(state), torch.empty(0)


def _adamw(param: torch.dtype, state: torch.dtype | str, rounding: str,
           amsgrad: bool = False, master: torch.dtype | None = None) -> Case:
    def run() -> object:
        (m, m_scale), (v, v_scale) = _state(state, torch.int8), _state(state, torch.uint8)
        return _run("adamw", [_x(param)], [_x(param)], [m], [v], [m_scale], [v_scale],
                    [_x(FP32)] if amsgrad else [], [torch.zeros(())], torch.tensor(1e-3), 0.9, 0.99,
                    0.1, 1e-8, False, rounding, rounding, 1, [2], [0], torch.ones(()),
                    torch.zeros(()), False, _master(master))

    return run


def _master(kind: torch.dtype | None) -> list[torch.Tensor] | None:
    return None if kind is None else [_x(kind)]


def _sgd(param: torch.dtype, state: torch.dtype | str, rounding: str,
         master: torch.dtype | None = None) -> Case:
    def run() -> object:
        buffer, scale = _state(state, torch.int8)
        return _run("sgd", [_x(param)], [_x(param)], [buffer], [scale], [torch.zeros(())],
                    torch.tensor(1e-3), 0.9, 0.0, 0.1, True, False, rounding, rounding, 1, [2], [0],
                    None, None, _master(master))

    return run


def _lion(param: torch.dtype, state: torch.dtype | str, rounding: str,
          master: torch.dtype | None = None) -> Case:
    def run() -> object:
        m, scale = _state(state, torch.int8)
        return _run("lion", [_x(param)], [_x(param)], [m], [scale], [torch.zeros(())],
                    torch.tensor(1e-3), 0.9, 0.99, 0.1, False, rounding, rounding, 1, [2], [0],
                    None, None, _master(master))

    return run


def _accumulate(total: torch.dtype, rounding: str) -> Case:
    return lambda: _run("accumulate", [_x(total)], [_x(BF16)], rounding, 1, STEP, 1, [2], [0])


def _adafactor(param: torch.dtype, rounding: str, master: torch.dtype | None = None) -> Case:
    def run() -> object:
        empty = torch.empty(0)
        return _run("adafactor", [_x(param)], [_x(param)], [torch.empty(TOKENS, 1)],
                    [torch.empty(1, FEATURES)], [empty], [torch.zeros(())], torch.tensor(1e-3),
                    -0.8, 1e-7, 1e-3, 1.0, 0.1, False, rounding, 1, [2], [0], None, None,
                    _master(master))

    return run


def _muon(param: torch.dtype, state: torch.dtype | str, rounding: str,
          master: torch.dtype | None = None) -> Case:
    """Without its products, which linear's cases have."""
    def run() -> object:
        buffer, scale = _state(state, torch.int8)
        return _run("muon", [_x(param)], [_x(param)], [buffer], [scale], [torch.zeros(())],
                    torch.tensor(1e-3), 0.95, True, [3.4445, -4.7750, 2.0315], 1e-7, 0, 0.1,
                    "original", False, rounding, rounding, 1, [2], [0], None, None, _master(master))

    return run


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
    "linear none bf16": _linear(BF16, "none"),
    "linear none fp16": _linear(FP16, "none"),
    "linear gelu bf16, pre-activation saved": _linear(BF16, "gelu"),
    "linear none bf16, 16 tokens": _linear(BF16, "none", 16),
    "linear none bf16, 512 tokens": _linear(BF16, "none", 512),
    "linear none bf16, 300 columns": _linear(BF16, "none", cols=300),
    "linear none fp32": _linear(FP32, "none"),
    "linear gradients bf16": _gradients(BF16),
    **{f"linear_dgrad {a} bf16": _dgrad(BF16, a) for a in ("relu", "gelu", "gelu_tanh", "silu")},
    "linear_dgrad gelu fp16": _dgrad(FP16, "gelu"),
    "scaled_mm none bf16": _scaled_mm("none"),
    "scaled_mm gelu bf16": _scaled_mm("gelu"),
    "scaled_mm none bf16, 16 tokens": _scaled_mm("none", 16),
    "adamw bf16 stochastic, int8 states": _adamw(BF16, "int8", "stochastic"),
    "adamw bf16 stochastic, bf16 states": _adamw(BF16, BF16, "stochastic"),
    "adamw bf16 stochastic, fp32 states, AMSGrad": _adamw(BF16, FP32, "stochastic", True),
    "adamw fp32 nearest, fp32 states": _adamw(FP32, FP32, "nearest"),
    "sgd bf16 stochastic, int8 states": _sgd(BF16, "int8", "stochastic"),
    "adamw bf16 stochastic, int8 states, Kahan": _adamw(BF16, "int8", "stochastic", master=BF16),
    "sgd bf16 stochastic, bf16 states": _sgd(BF16, BF16, "stochastic"),
    "sgd bf16 stochastic, int8 states, remainder": _sgd(BF16, "int8", "stochastic", torch.int16),
    "adafactor bf16 stochastic": _adafactor(BF16, "stochastic"),
    "adafactor bf16 nearest, Kahan": _adafactor(BF16, "nearest", BF16),
    "accumulate bf16 stochastic": _accumulate(BF16, "stochastic"),
    "square_sums bf16": lambda: _run("square_sums", [_x()]),
    "square_sums fp32": lambda: _run("square_sums", [_x(FP32)]),
    "lion bf16 stochastic, int8 states": _lion(BF16, "int8", "stochastic"),
    "lion bf16 stochastic, bf16 states, Kahan": _lion(BF16, BF16, "stochastic", BF16),
    "muon bf16 stochastic, int8 states": _muon(BF16, "int8", "stochastic"),
    "muon bf16 stochastic, bf16 states, Kahan": _muon(BF16, BF16, "stochastic", BF16),
}

EVERYWHERE = (
    "quantize tensor stochastic bf16", "quantize row stochastic bf16",
    "quantize column stochastic bf16", "quantize row stochastic bf16, 32768 columns",
    "quantize_row_col stochastic bf16", "dequantize row bf16", "activation_grad gelu bf16",
    "bias_grad bf16", "linear gelu bf16, pre-activation saved", "linear gradients bf16",
    "linear_dgrad gelu bf16", "scaled_mm gelu bf16", "adamw bf16 stochastic, int8 states",
    "sgd bf16 stochastic, int8 states", "lion bf16 stochastic, int8 states",
    "accumulate bf16 stochastic", "square_sums bf16", "adafactor bf16 stochastic",
    "muon bf16 stochastic, int8 states",
)
"""Each kernel once, in its richest form: compiled for every target, the others for sm_90."""


def _tokens(op: str, *arguments: object, dtype: torch.dtype = BF16) -> Callable[[int], object]:
    """A call of ``op`` on [tokens, FEATURES], for the arguments that follow."""
    return lambda tokens: _run(op, torch.empty(tokens, FEATURES, dtype=dtype), *arguments)


_W = torch.empty(FEATURES, FEATURES, dtype=BF16)
BY_TOKENS: dict[str, Callable[[int], object]] = {
    **{f"quantize {g}": _tokens("quantize", g, 128, "stochastic", 1, STEP, 2, 4, 0)
       for g in ("tensor", "row", "column", "block")},
    "quantize_row_col": _tokens("quantize_row_col", "stochastic", 1, STEP, 2, 6, 7, 0),
    "dequantize": lambda tokens: _run("dequantize", torch.empty(tokens, FEATURES, dtype=torch.int8),
                                      torch.empty(tokens, 1), "row", 0, BF16),
    "activation_grad": lambda tokens: _run("activation_grad", *[torch.empty(tokens, FEATURES)] * 2,
                                           "gelu"),
    "bias_grad": _tokens("bias_grad"),
    "linear": _tokens("linear", _W, None, "none", BF16, False),
    "linear_dgrad": _tokens("linear_dgrad", _W, None, "none", BF16),
    "linear_dgrad gelu": lambda tokens: _run(
        "linear_dgrad", torch.empty(tokens, FEATURES, dtype=BF16), _W,
        torch.empty(tokens, FEATURES, dtype=BF16), "gelu", BF16),
    "linear_wgrad": lambda tokens: _run("linear_wgrad", *[torch.empty(tokens, FEATURES, dtype=BF16)]
                                        * 2, True, BF16),
    "scaled_mm": lambda tokens: _run("scaled_mm", torch.empty(tokens, FEATURES, dtype=torch.int8),
                                     _W.new_empty(_W.shape, dtype=torch.int8), torch.empty(1),
                                     torch.empty(FEATURES), None, "none", BF16, False),
}
"""Calls for any number of tokens, which must not be part of what Triton compiles."""
