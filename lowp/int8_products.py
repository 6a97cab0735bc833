"""The three products of a linear layer where they are int8, and the codes of their operands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowp.key import Role
from lowp.native import cpu_extension
from lowp.ops.bias_grad import bias_grad
from lowp.ops.library import FLOATS, GRANULARITIES, ROUNDINGS, runs_directly
from lowp.ops.product import epilogue_of, preact_of
from lowp.ops.quantize import quantize, step_of
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import MAX_K, scaled_mm
from lowp.recipe import Operand, Product, Recipe
from lowp.weight_codes import are_shared, codes_of_weight

Codes = tuple[Tensor, Tensor]
"""Codes of a matrix and their scales [rows] or [1]."""


class Noise(NamedTuple):
    """The random bits of one call: the layer's, at the step of its forward pass."""

    seed: int
    step: Tensor
    tensor: int

    def codes(self, x: Tensor, operand: Operand, role: Role) -> Codes:
        """Codes of a matrix [M, K] with one scale a row, or one for all."""
        q, scale = quantize(x, operand.granularity, 0, operand.rounding, self.seed, self.step,
                            self.tensor, role, 0)
        return q, scale.reshape(-1)

    def transposed_codes(self, x: Tensor, operand: Operand, role: Role) -> Codes:
        """Codes [K, M] of a matrix [M, K] with one scale a column, or one for all.

        A draw belongs to the element of ``x``, so it is ``x`` that is quantized, then turned.
        """
        q, scale = quantize(x, _along_columns(operand), 0, operand.rounding, self.seed, self.step,
                            self.tensor, role, 0)
        return q.t(), scale.reshape(-1)

    def both_codes(self, x: Tensor, rounding: str, row_role: Role,
                   col_role: Role) -> tuple[Codes, Codes]:
        """:meth:`codes` and :meth:`transposed_codes` by row, out of the same reads."""
        q, scale, turned, turned_scale = quantize_row_col(
            x, rounding, self.seed, self.step, self.tensor, row_role, col_role, 0)
        return (q, scale.reshape(-1)), (turned, turned_scale)

    def weight_codes(self, w: Tensor, recipe: Recipe, transposed: bool) -> Codes:
        """Codes of a weight for the output, or transposed ones for the gradient of the input.

        The passes of a step may share them; then one reading gives both where it can.
        """
        operand = recipe.product("grad_input" if transposed else "output").right
        bits = None
        if operand.rounding == "stochastic":
            step = int(self.step) if self.step.device.type == "cpu" else self.step  # waits for none
            bits = self.seed, step, self.tensor
        if recipe.weight_is_read_once and are_shared(w):
            return codes_of_weight(w, (operand, bits), lambda: self.both_codes(
                w, operand.rounding, Role.WEIGHT_CODES, Role.WEIGHT_CODES))[transposed]
        make = self.transposed_codes if transposed else self.codes
        return codes_of_weight(w, (operand, transposed, bits),
                               lambda: make(w, operand, Role.WEIGHT_CODES))


def _along_columns(operand: Operand) -> str:
    return "column" if operand.granularity == "row" else "tensor"


def output(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, recipe: Recipe,
           noise: Noise, save_preact: bool,
           keep: bool) -> tuple[Tensor, Tensor | None, Codes | None]:
    """act(x wᵀ + bias) of x [M, K], w [N, K], in ``x``'s type; the pre-activation, ``None`` or
    empty unless saved; and, to keep for the gradient of the weight, codes of x by column."""
    role = Role.X_CODES
    y, preact, kept = _multiply(x, w, False, bias, activation, recipe, save_preact, noise, role,
                                role if keep and recipe.x_is_read_once else None)
    if keep and kept is None:
        kept = noise.transposed_codes(x, recipe.product("grad_weight").right, role)
    return y, preact, kept


def grad_input(dz: Tensor, w: Tensor, recipe: Recipe, noise: Noise,
               keep: bool) -> tuple[Tensor, Codes | None]:
    """dx [M, K] = dz [M, N] w [N, K], in dz's type; and codes of dz by column, to keep for the
    gradient of the weight where that takes what is read here."""
    together = keep and recipe.grad_is_read_once
    dx, _, kept = _multiply(dz, w, True, None, "none", recipe, False, noise, Role.GRAD_CODES_DGRAD,
                            Role.GRAD_CODES_WGRAD if together else None)
    return dx, kept


def grad_weight(dz: Tensor, dz_codes: Codes | None, x_codes: Codes, bias: bool, out: torch.dtype,
                recipe: Recipe, noise: Noise) -> tuple[Tensor, Tensor]:
    """dw [N, K] = dzᵀ [N, M] x [M, K], of codes by column; those of dz are made if not given. And
    the bias gradient: the sum of the unquantized dz."""
    operand = recipe.product("grad_weight").left
    codes, scale = dz_codes or noise.transposed_codes(dz, operand, Role.GRAD_CODES_WGRAD)
    q, q_scale = x_codes
    db = bias_grad(dz) if bias else dz.new_empty(0)
    if dz.shape[0] <= MAX_K:
        return scaled_mm(codes, q, scale, q_scale, None, "none", out, False)[0], db
    parts = [  # int32 holds the sum of so many products at most; the parts are added in fp32
        scaled_mm(a, b, scale, q_scale, None, "none", torch.float32, False)[0]
        for a, b in zip(codes.split(MAX_K, 1), q.split(MAX_K, 1), strict=True)
    ]
    return torch.stack(parts).sum(0).to(out), db


def _multiply(a: Tensor, w: Tensor, turned: bool, bias: Tensor | None, activation: str,
              recipe: Recipe, save_preact: bool, noise: Noise, role: Role,
              kept_role: Role | None) -> tuple[Tensor, Tensor | None, Codes | None]:
    """act(a wᵀ + bias) or, turned, act(a w + bias), in a's type; the pre-activation, ``None`` or
    empty unless saved; and codes of a by column where their draws have a role."""
    product = recipe.product("grad_input" if turned else "output")
    if a.shape[1] <= MAX_K and runs_directly(a, w, bias) and not are_shared(w):
        return _quantized_mm(a, w, turned, bias, activation, product, save_preact, noise, role,
                             kept_role)
    kept = None
    if kept_role is None:
        codes, scale = noise.codes(a, product.left, role)
    else:
        (codes, scale), kept = noise.both_codes(a, product.left.rounding, role, kept_role)
    w_codes, w_scale = noise.weight_codes(w, recipe, turned)
    y, preact = scaled_mm(codes, w_codes, scale, w_scale, bias, activation, a.dtype, save_preact)
    return y, preact, kept


def _quantized_mm(a: Tensor, b: Tensor, turned: bool, bias: Tensor | None, activation: str,
                  product: Product, save_preact: bool, noise: Noise, role: Role,
                  kept_role: Role | None) -> tuple[Tensor, Tensor | None, Codes | None]:
    """:func:`_multiply` of a [M, K] and b [N, K] or, turned, [K, N], in one call of the CPU kernels
    (csrc/quantized_mm.h), which checks nothing and shares no codes."""
    a, b = a.contiguous(), b.contiguous()
    (rows, depth), cols = a.shape, b.shape[turned]
    left, right = product.left, product.right
    bias = None if bias is None else bias.contiguous()
    y = a.new_empty(rows, cols)
    preact = preact_of(a, cols, a.dtype, save_preact)
    kept = None if kept_role is None else (a.new_empty(depth, rows, dtype=torch.int8),
                                           a.new_empty(depth, dtype=torch.float32))
    stochastic = "stochastic" in (left.rounding, right.rounding)
    extension = cpu_extension()
    extension.quantized_mm(
        a.data_ptr(), FLOATS[a.dtype], GRANULARITIES[left.granularity], ROUNDINGS[left.rounding],
        role, b.data_ptr(), FLOATS[b.dtype],
        GRANULARITIES[_along_columns(right) if turned else right.granularity],
        ROUNDINGS[right.rounding], Role.WEIGHT_CODES, rows, cols, depth, turned,
        noise.seed & (2**64 - 1), step_of(noise.step) if stochastic else 1, noise.tensor,
        kept[0].data_ptr() if kept else 0, kept[1].data_ptr() if kept else 0, kept_role or 0,
        epilogue_of(bias, activation, y, preact), torch.get_num_threads(),
    )
    return y, preact, kept
