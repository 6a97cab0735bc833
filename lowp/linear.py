"""The linear layer: one forward product and the two of its backward, each by the recipe."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowp import float_products
from lowp.key import Key, Role, clock, tensor_id
from lowp.ops.activation_grad import activation_grad
from lowp.ops.bias_grad import bias_grad
from lowp.ops.product import ACTIVATIONS
from lowp.ops.quantize import quantize
from lowp.ops.quantize_row_col import quantize_row_col
from lowp.ops.scaled_mm import MAX_K, scaled_mm
from lowp.recipe import Operand, Product, Recipe, recipe_of
from lowp.weight_codes import are_shared, codes_of_weight


class _Noise:
    """The random bits of one call: the layer's, at the step of its forward pass."""

    def __init__(self, seed: int, step: Tensor, tensor: int) -> None:
        self.seed, self.step, self.tensor = seed, step, tensor

    def codes(self, x: Tensor, operand: Operand, role: Role) -> tuple[Tensor, Tensor]:
        """Codes of a matrix [M, K] with one scale a row, or one for all."""
        q, scale = quantize(x, operand.granularity, 0, operand.rounding, self.seed, self.step,
                            self.tensor, role, 0)
        return q, scale.reshape(-1)

    def transposed_codes(self, x: Tensor, operand: Operand, role: Role) -> tuple[Tensor, Tensor]:
        """Codes [K, M] of a matrix [M, K] with one scale a column, or one for all.

        A draw belongs to the element of ``x``, so it is ``x`` that is quantized, then turned.
        """
        granularity = "column" if operand.granularity == "row" else "tensor"
        q, scale = quantize(x, granularity, 0, operand.rounding, self.seed, self.step,
                            self.tensor, role, 0)
        return q.t(), scale.reshape(-1)

    def both_codes(self, x: Tensor, rounding: str, row_role: Role, col_role: Role,
                   ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """:meth:`codes` and :meth:`transposed_codes` by row, out of the same reads."""
        q, scale, turned, turned_scale = quantize_row_col(
            x, rounding, self.seed, self.step, self.tensor, row_role, col_role, 0)
        return (q, scale.reshape(-1)), (turned, turned_scale)

    def weight_codes(self, w: Tensor, recipe: Recipe, transposed: bool) -> tuple[Tensor, Tensor]:
        """Codes of a weight for the output, or transposed ones for the gradient of the input.

        The passes of a step may share them; then one reading gives both where it can.
        """
        output, dgrad = recipe.product("output"), recipe.product("grad_input")
        operand = dgrad.right if transposed else output.right
        bits = None
        if operand.rounding == "stochastic":
            step = int(self.step) if self.step.device.type == "cpu" else self.step  # waits for none
            bits = self.seed, step, self.tensor
        if are_shared(w) and _are_read_together(output, output.right, dgrad, dgrad.right):
            return codes_of_weight(w, (operand, bits), lambda: self.both_codes(
                w, operand.rounding, Role.WEIGHT_CODES, Role.WEIGHT_CODES))[transposed]
        make = self.transposed_codes if transposed else self.codes
        return codes_of_weight(w, (operand, transposed, bits),
                               lambda: make(w, operand, Role.WEIGHT_CODES))


def _are_read_together(first: Product, row: Operand, second: Product, column: Operand) -> bool:
    """Whether one reading gives the codes of an operand by row and those of it by column."""
    return first.is_int8 and second.is_int8 and row == column and row.granularity == "row"


def _forward(x: Tensor, x_codes: tuple[Tensor, Tensor] | None, w: Tensor, bias: Tensor | None,
             recipe: Recipe, activation: str, noise: _Noise,
             save_preact: bool) -> tuple[Tensor, Tensor | None]:
    product = recipe.product("output")
    if not product.is_int8:
        return float_products.output(x, w, bias, activation, product, save_preact)
    codes, scale = x_codes or noise.codes(x, product.left, Role.X_CODES)
    w_codes, w_scale = noise.weight_codes(w, recipe, False)
    y, preact = scaled_mm(codes, w_codes, scale, w_scale, bias, activation, x.dtype, save_preact)
    return y, preact


def _grad_input(dz: Tensor, dz_codes: tuple[Tensor, Tensor] | None, w: Tensor, out: torch.dtype,
                recipe: Recipe, noise: _Noise) -> Tensor:
    """dx [M, K] = dz [M, N] w [N, K]"""
    product = recipe.product("grad_input")
    if not product.is_int8:
        return float_products.grad_input(dz, w, None, "none", out, product)
    codes, scale = dz_codes or noise.codes(dz, product.left, Role.GRAD_CODES_DGRAD)
    w_codes, w_scale = noise.weight_codes(w, recipe, True)
    dx: Tensor = scaled_mm(codes, w_codes, scale, w_scale, None, "none", out, False)[0]
    return dx


def _grad_weight(dz: Tensor, dz_codes: tuple[Tensor, Tensor] | None, x: Tensor,
                 x_codes: tuple[Tensor, Tensor] | None, bias: bool, out: torch.dtype,
                 recipe: Recipe, noise: _Noise) -> tuple[Tensor, Tensor]:
    """dw [N, K] = dzᵀ [N, M] x [M, K], and the bias gradient: the sum of the unquantized dz"""
    product = recipe.product("grad_weight")
    if not product.is_int8:
        return float_products.grad_weight(dz, x, bias, out, product)
    codes, scale = dz_codes or noise.transposed_codes(dz, product.left, Role.GRAD_CODES_WGRAD)
    q, q_scale = x_codes or noise.transposed_codes(x, product.right, Role.X_CODES)
    db = bias_grad(dz) if bias else dz.new_empty(0)
    if dz.shape[0] <= MAX_K:
        return scaled_mm(codes, q, scale, q_scale, None, "none", out, False)[0], db
    parts = [  # int32 holds the sum of so many products at most; the parts are added in fp32
        scaled_mm(a, b, scale, q_scale, None, "none", torch.float32, False)[0]
        for a, b in zip(codes.split(MAX_K, 1), q.split(MAX_K, 1), strict=True)
    ]
    return torch.stack(parts).sum(0).to(out), db


def _gradients(dy: Tensor, x: Tensor, w: Tensor, preact: Tensor | None,
               x_codes: tuple[Tensor, Tensor] | None, bias_dtype: torch.dtype | None,
               needs: tuple[bool, bool, bool], recipe: Recipe, activation: str,
               noise: _Noise) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), each in its parameter's type and only where needed."""
    dz = dy if activation == "none" else activation_grad(dy, preact, activation)
    need_x, need_w, need_b = needs
    rows = cols = None
    dgrad, wgrad = recipe.product("grad_input"), recipe.product("grad_weight")
    if need_x and need_w and _are_read_together(dgrad, dgrad.left, wgrad, wgrad.left):
        rows, cols = noise.both_codes(dz, dgrad.left.rounding, Role.GRAD_CODES_DGRAD,
                                      Role.GRAD_CODES_WGRAD)
    dx = _grad_input(dz, rows, w, x.dtype, recipe, noise) if need_x else None
    if not need_w:
        db = bias_grad(dz) if need_b else None
        return dx, None, None if db is None else db.to(bias_dtype)
    dw, db = _grad_weight(dz, cols, x, x_codes, need_b, w.dtype, recipe, noise)
    return dx, dw, db.to(bias_dtype) if need_b else None


class _Second(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative exists."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, w: Tensor, bias: Tensor | None,
                preact: Tensor | None, x_codes: tuple[Tensor, Tensor] | None,
                options: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(dy, x, w, bias)
        ctx.options = options
        needs, recipe, activation, noise = options
        return _gradients(dy, x, w, preact, x_codes, None if bias is None else bias.dtype, needs,
                          recipe, activation, noise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, recipe, activation, _ = ctx.options
        if recipe.uses_int8:
            raise RuntimeError(
                f"lowp.linear: recipe {recipe.name!r} has no second derivative, since int8 codes "
                "are piecewise constant; use an fp32, fp16 or bf16 recipe for create_graph=True"
            )
        with torch.enable_grad():
            leaves: list[Any] = [
                None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors
            ]
            dy, x, w, bias = leaves
            z = nn.functional.linear(x.float(), w.float(), None if bias is None else bias.float())
            y = _activate(z, activation)
            inputs = [t for t, need in zip((x, w, bias), needs, strict=True) if need]
            first = torch.autograd.grad(y, inputs, dy.float(), create_graph=True)
            given = [g for g, need in zip(grads, needs, strict=True) if need]
            pairs = [(f, g.to(f.dtype)) for f, g in zip(first, given, strict=True) if g is not None]
            wanted = [t for t in leaves if t is not None]
            second = torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs],
                                         allow_unused=True)
        found = iter(second)
        result = [None if t is None else next(found) for t in leaves]
        return (*result, None, None, None)


def _activate(z: Tensor, activation: str) -> Tensor:
    functional = nn.functional
    if activation == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    return z if activation == "none" else getattr(functional, activation)(z)


class LinearFunction(torch.autograd.Function):
    """``y = act(x wᵀ + b)`` of matrices, with gradients by the recipe: the layer's only autograd.

    The step whose random bits the backward uses is saved with the saved tensors, so a recomputed
    forward (activation checkpointing) and a second backward draw the same bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe,
                activation: str, seed: int, step: Tensor, tensor: int) -> Tensor:
        noise = _Noise(seed, step, tensor)
        needs = ctx.needs_input_grad
        save_preact = activation != "none" and any(needs[:3])
        codes: tuple[Tensor, ...] = ()
        x_codes = None
        output, wgrad = recipe.product("output"), recipe.product("grad_weight")
        keep_x = needs[1] and not wgrad.is_int8
        if needs[1] and not keep_x:
            if _are_read_together(output, output.left, wgrad, wgrad.right):
                x_codes, codes = noise.both_codes(x, output.left.rounding, Role.X_CODES,
                                                  Role.X_CODES)
            else:
                codes = noise.transposed_codes(x, wgrad.right, Role.X_CODES)
        y, preact = _forward(x, x_codes, w, bias, recipe, activation, noise, save_preact)
        ctx.save_for_backward(
            x if keep_x else x.new_empty((0, x.shape[1])), w, bias, preact, step, *codes
        )
        ctx.options = recipe, activation, seed, tensor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, preact, step, *codes = ctx.saved_tensors
        recipe, activation, seed, tensor = ctx.options
        noise = _Noise(seed, step, tensor)
        needs = ctx.needs_input_grad[:3]
        dy = grads[0]
        x_codes = (codes[0], codes[1]) if codes else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            options = (needs, recipe, activation, noise)
            second = _Second.apply(  # type: ignore[no-untyped-call]
                dy, x, w, bias, preact, x_codes, options)
            return (*second, *[None] * 5)
        found = _gradients(dy, x, w, preact, x_codes, None if bias is None else bias.dtype, needs,
                           recipe, activation, noise)
        return (*found, *[None] * 5)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none",
           recipe: str | int | Recipe = "bf16", *, key: Key | None = None) -> Tensor:
    """``act(x weightᵀ + bias)``, in the precision that ``recipe`` says.

    Operands of a 16-bit product are cast to its type, sums are fp32, bias and activation are
    applied in fp32, and the result is rounded once, to ``x``'s type. Gradients come in the type of
    what they belong to. Under autocast all operands are first cast as ``F.linear``'s are.

    Args:
        x: fp32, bf16 or fp16, [..., K]; may be empty or strided.
        weight: [N, K], of ``x``'s type unless the recipe casts it.
        bias: [N], any float type.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        recipe: a recipe or its name (:func:`lowp.recipe.recipe_of`).
        key: seed, step and tensor of the stochastic roundings; by default the recipe's seed, the
            step of :data:`lowp.key.clock` and tensor 0.

    Returns:
        [..., N] in ``x``'s type (under autocast: autocast's).

    Raises:
        ValueError: shapes that do not fit, an unknown activation or recipe.
        TypeError: types that the recipe does not take.
    """
    chosen = recipe_of(recipe)
    if key is None:
        return _linear(x, weight, bias, activation, chosen, chosen.seed, None, 0)
    step = None if key.step is None else torch.tensor(key.step, dtype=torch.int64)
    return _linear(x, weight, bias, activation, chosen, key.seed, step, key.tensor)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, recipe: Recipe, seed: int,
            step: Tensor | None, tensor: int) -> Tensor:
    """:func:`linear` with its recipe and key taken apart; without a step the clock's is meant."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w = x.to(dtype), w.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, w, bias, activation, recipe)
    if step is None:
        step = clock.on(x.device) if recipe.is_stochastic else clock.step
    flat = x.dim() == 2
    rows = x if flat else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y: Tensor
    if torch.is_grad_enabled():
        y = LinearFunction.apply(  # type: ignore[no-untyped-call]
            rows, w, bias, recipe, activation, seed, step, tensor)
    else:
        noise = _Noise(seed, step, tensor)
        y = _forward(rows, None, w, bias, recipe, activation, noise, False)[0]
    return y if flat else y.reshape(*x.shape[:-1], w.shape[0])


def _check(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, recipe: Recipe) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"lowp.linear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if w.dim() != 2 or x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            "lowp.linear: expected x [..., K] and weight [N, K], "
            f"got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(
            f"lowp.linear: expected bias of shape ({w.shape[0]},), got {tuple(bias.shape)}"
        )
    if x.dtype != w.dtype and recipe.product("output").precision == "fp32":
        raise TypeError(
            f"lowp.linear: x is {x.dtype} and weight {w.dtype}; recipe {recipe.name!r} multiplies "
            "operands as they come, so they must be of one type"
        )


_positions = itertools.count()


class Linear(nn.Linear):
    """``nn.Linear`` whose three products run in the precision of a recipe.

    Keys, initialization, hooks and strict loading are those of ``nn.Linear``, and there is no state
    besides its own.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int8_full"``, 32, 16 (fp16),
            8, or a :class:`lowp.Recipe`.
        activation: fused after the bias, see :func:`linear`.
        name: the layer's qualified name; its crc32 keys the random bits. Without one, the number
            of layers made before in this process does.
    """

    recipe: Recipe
    activation: str
    noise_id: int

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None,
                 dtype: torch.dtype | None = None, *, precision: str | int | Recipe = "fp32",
                 activation: str = "none", name: str | None = None) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.adopt(precision, name, activation)

    def adopt(self, precision: str | int | Recipe, name: str | None = None,
              activation: str = "none") -> None:
        """Set what an ``nn.Linear`` does not have."""
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"lowp.Linear: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.recipe = recipe_of(precision)
        self.activation = activation
        self.noise_id = next(_positions) if name is None else tensor_id(name)

    def forward(self, input: Tensor) -> Tensor:
        """``act(input weightᵀ + bias)``, [..., in_features] to [..., out_features]."""
        recipe = self.recipe
        return _linear(input, self.weight, self.bias, self.activation, recipe, recipe.seed, None,
                       self.noise_id)

    def extra_repr(self) -> str:
        """As ``nn.Linear``'s, followed by what differs from it."""
        text = super().extra_repr()
        if self.recipe.name != "fp32":
            text += f", precision={self.recipe.name}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"
