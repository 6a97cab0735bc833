"""The linear layer: one forward product and the two of its backward, each by the recipe."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.function import once_differentiable

from lowp import float_products, int8_products
from lowp.int8_products import Codes, Noise
from lowp.key import Key, Role, clock, tensor_id
from lowp.ops.activation_grad import activation_grad
from lowp.ops.bias_grad import bias_grad
from lowp.ops.product import ACTIVATIONS
from lowp.recipe import Recipe, recipe_of


def _output(x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe, activation: str,
            noise: Noise, save_preact: bool,
            keep: bool) -> tuple[Tensor, Tensor | None, Codes | None]:
    """The output; what the activation is applied to; codes of x, to keep for the gradient of w."""
    product = recipe.product("output")
    if product.is_int8:
        return int8_products.output(x, w, bias, activation, recipe, noise, save_preact, keep)
    y, preact = float_products.output(x, w, bias, activation, product, save_preact)
    if not keep:
        return y, preact, None
    operand = recipe.product("grad_weight").right
    return y, preact, noise.transposed_codes(x, operand, Role.X_CODES)


def _gradients(dy: Tensor, x: Tensor | None, w: Tensor, preact: Tensor | None,
               x_codes: Codes | None, bias_dtype: torch.dtype | None,
               needs: tuple[bool, bool, bool], recipe: Recipe, activation: str,
               noise: Noise) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), each in its parameter's type and only where needed."""
    need_x, need_w, need_b = needs
    dz = dy if activation == "none" else activation_grad(dy, preact, activation)
    dgrad, wgrad = recipe.product("grad_input"), recipe.product("grad_weight")
    dx = dw = db = dz_codes = None
    if need_x and dgrad.is_int8:
        dx, dz_codes = int8_products.grad_input(dz, w, recipe, noise, need_w)
    elif need_x:
        dx = float_products.grad_input(dz, w, None, "none", dz.dtype, dgrad)
    if need_w and x_codes is not None:
        dw, db = int8_products.grad_weight(dz, dz_codes, x_codes, need_b, w.dtype, recipe, noise)
    elif need_w and x is not None:
        dw, db = float_products.grad_weight(dz, x, need_b, w.dtype, wgrad)
    elif need_b:
        db = bias_grad(dz)
    return dx, dw, db.to(bias_dtype) if need_b and db is not None else None


class _Second(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative exists."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor | None, w: Tensor, bias: Tensor | None,
                preact: Tensor | None, x_codes: Codes | None,
                options: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(dy, x, w, bias)
        ctx.options = options
        return _gradients(dy, x, w, preact, x_codes, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, needs, recipe, activation, _ = ctx.options
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
            if x is None and activation != "none":
                raise RuntimeError(
                    f"lowp.linear: activation {activation!r} has no second derivative where the "
                    "weight needs no gradient, since x is then not kept; use torch's activation"
                )
            if x is None:  # of which the gradients are then no function
                x = dy.new_zeros((dy.shape[0], w.shape[1])).requires_grad_()
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
        return (*result, *[None] * 3)


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
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, step: Tensor,
                options: tuple[Recipe, str, int, int]) -> Tensor:
        recipe, activation, seed, tensor = ctx.options = options
        need_x, need_w, need_b, _, _ = ctx.needs_input_grad
        save_preact = activation != "none" and (need_x or need_w or need_b)
        keep_codes = need_w and recipe.product("grad_weight").is_int8
        y, preact, codes = _output(x, w, bias, recipe, activation, Noise(seed, step, tensor),
                                   save_preact, keep_codes)
        kept = x if need_w and codes is None else None
        ctx.save_for_backward(kept, w, bias, preact, step, *(codes or ()))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, preact, step, *codes = ctx.saved_tensors
        recipe, activation, seed, tensor = ctx.options
        options = (None if bias is None else bias.dtype, ctx.needs_input_grad[:3], recipe,
                   activation, Noise(seed, step, tensor))
        x_codes = (codes[0], codes[1]) if codes else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _Second.apply(  # type: ignore[no-untyped-call]
                grads[0], x, w, bias, preact, x_codes, options)
        else:
            found = _gradients(grads[0], x, w, preact, x_codes, *options)
        return (*found, None, None)


def _apply(x: Tensor, w: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    """``LinearFunction.apply``, in two thirds of its time where functorch has no part in it.

    torch's looks, in Python, for a transform that runs and for tensors that have left one.
    """
    if (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            or is_functorch_wrapped_tensor(x) or is_functorch_wrapped_tensor(w)
            or (bias is not None and is_functorch_wrapped_tensor(bias))):
        y: Tensor = LinearFunction.apply(x, w, bias, *others)  # type: ignore[no-untyped-call]
    else:
        y = super(torch.autograd.Function, LinearFunction).apply(  # type: ignore[no-untyped-call]
            x, w, bias, *others)
    return y


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
    if torch._C._is_any_autocast_enabled():
        x, w, bias = under_autocast(x, w, bias)
    _check(x, w, bias, activation, recipe)
    if step is None:
        step = clock.on(x.device) if recipe.is_stochastic else clock.step
    flat = x.dim() == 2
    rows = x if flat else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y: Tensor
    if torch.is_grad_enabled():
        y = _apply(rows, w, bias, step, (recipe, activation, seed, tensor))
    else:
        noise = Noise(seed, step, tensor)
        y = _output(rows, w, bias, recipe, activation, noise, False, False)[0]
    return y if flat else y.reshape(*x.shape[:-1], w.shape[0])


def under_autocast(x: Tensor, *others: Tensor | None) -> Any:
    """All in the type that autocast, where it is on for ``x``'s device, casts F.linear's to."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in (x, *others)]


def _check(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, recipe: Recipe) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"lowp.linear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    shape = w.shape
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            "lowp.linear: expected x [..., K] and weight [N, K], "
            f"got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    if bias is not None and bias.shape != (shape[0],):
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
        parameters: dict[str, Any] = self._parameters  # where nn.Module looks last, and slowly
        if "weight" in parameters and "bias" in parameters:
            w, bias = parameters["weight"], parameters["bias"]
        else:  # torch.nn.utils.parametrize and others compute one
            w, bias = self.weight, self.bias
        return _linear(input, w, bias, self.activation, recipe, recipe.seed, None, self.noise_id)

    def extra_repr(self) -> str:
        """As ``nn.Linear``'s, followed by what differs from it."""
        text = super().extra_repr()
        if self.recipe.name != "fp32":
            text += f", precision={self.recipe.name}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"
