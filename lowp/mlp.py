"""Two linear layers with an activation between them, whose gradient is a part of a product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowp import float_products
from lowp.key import Key, tensor_id
from lowp.linear import Linear, linear, under_autocast
from lowp.ops.bias_grad import bias_grad
from lowp.ops.product import ACTIVATIONS
from lowp.recipe import Product, Recipe, recipe_of

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]  # x, w1, b1, w2, b2


def _parameter_gradients(dz: Tensor, x: Tensor, w: Tensor, bias: Tensor | None,
                         needs: tuple[bool, bool],
                         product: Product) -> tuple[Tensor | None, Tensor | None]:
    """(dw, db) of one layer, each in its parameter's type and only where needed."""
    need_w, need_b = needs
    dw = db = None
    if need_w:
        dw, db = float_products.grad_weight(dz, x, need_b, w.dtype, product)
    elif need_b:
        db = bias_grad(dz)
    return dw, db.to(bias.dtype) if need_b and db is not None and bias is not None else None


def _recorded_gradients(dy: Tensor, operands: Operands, needs: tuple[bool, ...], recipe: Recipe,
                        activation: str) -> list[Tensor | None]:
    """The gradients as functions that autograd records: those of two layers, one by one."""
    # views, so that a gradient stops here although one operand may have come from another
    views = [None if t is None else t.view_as(t) for t in operands]
    x, w1, b1, w2, b2 = views
    assert x is not None and w1 is not None and w2 is not None
    y = linear(linear(x, w1, b1, activation, recipe), w2, b2, "none", recipe)
    wanted = [t for t, need in zip(views, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


class MLPFunction(torch.autograd.Function):
    """``act(x w1ᵀ + b1) w2ᵀ + b2`` of matrices, by a recipe whose products are float.

    The gradient before the activation comes out of the second layer's product, rounded once; the
    one behind it is never stored.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
                recipe: Recipe, activation: str) -> Tensor:
        need_w1, need_w2 = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        product = recipe.product("output")
        h, preact = float_products.output(x, w1, b1, activation, product,
                                          any(ctx.needs_input_grad[:3]))
        y = float_products.output(h, w2, b2, "none", product, False)[0]
        ctx.save_for_backward(x if need_w1 else None, w1, b1, w2, b2, preact,
                              h if need_w2 else None)
        ctx.options = recipe, activation, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, preact, h = ctx.saved_tensors
        recipe, activation, dtype = ctx.options
        need_x, need_w1, need_b1, need_w2, need_b2 = needs = ctx.needs_input_grad[:5]
        dy = grads[0]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if x is None:
                raise RuntimeError("lowp.mlp: no second derivative where w1 needs no gradient, "
                                   "since x is then not kept; use two lowp.linear and torch's "
                                   "activation")
            found = _recorded_gradients(dy, (x, w1, b1, w2, b2), needs, recipe, activation)
            return (*found, None, None)
        dgrad, wgrad = recipe.product("grad_input"), recipe.product("grad_weight")
        dw2, db2 = _parameter_gradients(dy, h, w2, b2, (need_w2, need_b2), wgrad)
        if not (need_x or need_w1 or need_b1):
            return None, None, None, dw2, db2, None, None
        dz = float_products.grad_input(dy, w2, preact, activation, dtype, dgrad)
        dx = float_products.grad_input(dz, w1, None, "none", dtype, dgrad) if need_x else None
        dw1, db1 = _parameter_gradients(dz, x, w1, b1, (need_w1, need_b1), wgrad)
        return dx, dw1, db1, dw2, db2, None, None


def _fuses(recipe: Recipe, activation: str) -> bool:
    """Whether the second layer's product can take what the first one's kept as it is."""
    output, dgrad = recipe.product("output"), recipe.product("grad_input")
    return (activation != "none" and not recipe.uses_int8
            and output.precision == dgrad.precision)


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
        activation: str = "gelu", recipe: str | int | Recipe = "bf16", *,
        key: Key | None = None) -> Tensor:
    """``act(x w1ᵀ + b1) w2ᵀ + b2``: two :func:`lowp.linear`, bit for bit, in the forward pass.

    By a recipe of float products, the backward pass multiplies by the activation's derivative in
    the epilogue of the second layer's gradient (:data:`lowp.ops.linear_dgrad.linear_dgrad`): a
    rounding, a write and a read of [..., H] less. An int8 recipe, no activation, or unlike
    precisions of output and grad_input are two layers in the backward pass too, and so is a
    backward pass that is itself differentiated.

    Args:
        x: fp32, bf16 or fp16, [..., K]; may be empty or strided.
        w1: [H, K]. b1: [H] or ``None``. w2: [N, H]. b2: [N] or ``None``. Types as in
            :func:`lowp.linear`.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        recipe: a recipe or its name (:func:`lowp.recipe.recipe_of`).
        key: of the stochastic roundings of the first layer, as in :func:`lowp.linear`; the second
            layer's ``tensor`` is the crc32 of the first one's number and ``.down``.

    Returns:
        [..., N] in ``x``'s type (under autocast: autocast's).

    Raises:
        ValueError: shapes that do not fit, an unknown activation or recipe.
        TypeError: types that the recipe does not take.
        RuntimeError: a second derivative of float products where ``w1`` needs no gradient.
    """
    chosen = recipe_of(recipe)
    x, w1, b1, w2, b2 = under_autocast(x, w1, b1, w2, b2)
    _check(x, w1, b1, w2, b2, activation, chosen)
    if not (torch.is_grad_enabled() and _fuses(chosen, activation)):
        up = Key(chosen.seed) if key is None else key
        down = up._replace(tensor=tensor_id(f"{up.tensor}.down"))
        return linear(linear(x, w1, b1, activation, chosen, key=up), w2, b2, "none", chosen,
                      key=down)
    lead = x.shape[:-1]
    rows = x if len(lead) == 1 else x.reshape(math.prod(lead), x.shape[-1])
    y: Tensor = MLPFunction.apply(  # type: ignore[no-untyped-call]
        rows, w1, b1, w2, b2, chosen, activation)
    return y if len(lead) == 1 else y.reshape(*lead, w2.shape[0])


def _check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
           activation: str, recipe: Recipe) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"lowp.mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if (x.dim() == 0 or w1.dim() != 2 or w2.dim() != 2 or x.shape[-1] != w1.shape[1]
            or w1.shape[0] != w2.shape[1]):
        raise ValueError(
            "lowp.mlp: expected x [..., K], w1 [H, K] and w2 [N, H], "
            f"got {tuple(x.shape)}, {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    for name, bias, w in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != (w.shape[0],):
            raise ValueError(
                f"lowp.mlp: expected {name} of shape ({w.shape[0]},), got {tuple(bias.shape)}"
            )
    if recipe.product("output").precision == "fp32" and not x.dtype == w1.dtype == w2.dtype:
        raise TypeError(
            f"lowp.mlp: x is {x.dtype}, w1 {w1.dtype} and w2 {w2.dtype}; recipe {recipe.name!r} "
            "multiplies operands as they come, so they must be of one type"
        )


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing but its own forward pass happens when a layer is called."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks,
             layer._backward_hooks)
    return type(layer) is Linear and not any(hooks) and "forward" not in layer.__dict__


class MLP(nn.Module):
    """``down(act(up(x)))`` by :func:`mlp`: the feed-forward block of a transformer.

    Both layers are :class:`lowp.Linear`, so keys are ``up.weight``, ``up.bias``, ``down.weight``
    and ``down.bias``, and :func:`lowp.convert` reaches them. Layers with hooks, of another class,
    or of two recipes run one after the other, as they would by themselves. FSDP2 shards it whole,
    or layer by layer, which is such a hook.

    Args:
        in_features, hidden_features, out_features: K, H and N.
        bias, device, dtype, precision: as in :class:`lowp.Linear`, of both layers.
        activation: between them, see :func:`mlp`.
        name: the block's qualified name, which keys the random bits of its layers.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int,
                 bias: bool = True, device: Any = None, dtype: torch.dtype | None = None, *,
                 activation: str = "gelu", precision: str | int | Recipe = "fp32",
                 name: str | None = None) -> None:
        super().__init__()
        up, down = (None if name is None else f"{name}.{part}" for part in ("up", "down"))
        self.up = Linear(in_features, hidden_features, bias, device, dtype, precision=precision,
                         activation=activation, name=up)
        self.down = Linear(hidden_features, out_features, bias, device, dtype,
                           precision=precision, name=down)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        up, down = self.up, self.down
        if (_is_plain(up) and _is_plain(down) and up.recipe == down.recipe
                and down.activation == "none" and _fuses(up.recipe, up.activation)):
            return mlp(input, up.weight, up.bias, down.weight, down.bias, up.activation, up.recipe)
        y: Tensor = down(up(input))
        return y
