"""Which precision each of a linear layer's three matrix products runs in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BITS = {32: "fp32", 16: "fp16", 8: "int8"}


@dataclass(frozen=True)
class Operand:
    """How one operand of an int8 product is quantized.

    Attributes:
        granularity: ``"row"``, one scale a vector along the contraction axis (a token of the
            input, an output or input channel of the weight), or ``"tensor"``, one scale for all.
        rounding: ``"nearest"`` or ``"stochastic"``.
    """

    granularity: str = "row"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.granularity not in ("row", "tensor"):
            raise ValueError(
                "lowp.Operand: granularity must be 'row' or 'tensor' (a scale must be constant "
                f"along the contraction axis), got {self.granularity!r}"
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"lowp.Operand: rounding must be 'nearest' or 'stochastic', got {self.rounding!r}"
            )


@dataclass(frozen=True)
class Product:
    """One matrix product: its precision, and for int8 how its two operands are quantized.

    Attributes:
        precision: ``"fp32"`` (operands as they come), ``"fp16"``, ``"bf16"`` or ``"int8"``.
        left: the input (output), or the gradient of the output (the two gradients).
        right: the weight (output, grad_input), or the input (grad_weight).
    """

    precision: str = "fp32"
    left: Operand = Operand()
    right: Operand = Operand()

    def __post_init__(self) -> None:
        if self.precision not in (*DTYPES, "int8"):
            raise ValueError(
                f"lowp.Product: precision must be fp32, fp16, bf16 or int8, got {self.precision!r}"
            )

    @property
    def is_int8(self) -> bool:
        """Whether the operands are quantized to int8 codes."""
        return self.precision == "int8"


_PRODUCTS = ("output", "grad_input", "grad_weight")
_GRADIENT = Operand(rounding="stochastic")


@dataclass(frozen=True)
class Recipe:
    """The precision of ``y = x wᵀ``, ``dx = dy w`` and ``dw = dyᵀ x``.

    A string stands for a :class:`Product` of that precision with its default operands: nearest for
    inputs and weights, stochastic for gradients, whose rounding errors would otherwise accumulate
    as a bias (Gupta et al., "Deep learning with limited numerical precision", ICML 2015, sec. 3).

    Attributes:
        output, grad_input, grad_weight: the three products.
        seed: seed of the stochastic roundings.
        uses_int8: whether any product is quantized; such a layer has no second derivative.
        is_stochastic: whether any operand is rounded stochastically.
        x_is_read_once, weight_is_read_once, grad_is_read_once: whether one reading gives an
            operand's codes by row, for one product, and those by column for another.
    """

    output: Product | str = "fp32"
    grad_input: Product | str = "fp32"
    grad_weight: Product | str = "fp32"
    seed: int = 0
    uses_int8: bool = field(init=False, repr=False, compare=False)
    is_stochastic: bool = field(init=False, repr=False, compare=False)
    x_is_read_once: bool = field(init=False, repr=False, compare=False)
    weight_is_read_once: bool = field(init=False, repr=False, compare=False)
    grad_is_read_once: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in _PRODUCTS:
            value = getattr(self, name)
            if isinstance(value, str):
                left = Operand() if name == "output" else _GRADIENT
                object.__setattr__(self, name, Product(value, left))
            elif not isinstance(value, Product):
                raise TypeError(
                    f"lowp.Recipe: {name} must be a precision name or a Product, "
                    f"got {type(value).__name__}"
                )
        quantized = [p for p in map(self.product, _PRODUCTS) if p.is_int8]
        roundings = {r for p in quantized for r in (p.left.rounding, p.right.rounding)}
        object.__setattr__(self, "uses_int8", bool(quantized))
        object.__setattr__(self, "is_stochastic", "stochastic" in roundings)
        output, dgrad, wgrad = map(self.product, _PRODUCTS)
        for name, first, row, second, column in (
            ("x_is_read_once", output, output.left, wgrad, wgrad.right),
            ("weight_is_read_once", output, output.right, dgrad, dgrad.right),
            ("grad_is_read_once", dgrad, dgrad.left, wgrad, wgrad.left),
        ):
            int8 = first.is_int8 and second.is_int8
            object.__setattr__(self, name, int8 and row == column and row.granularity == "row")

    def product(self, name: str) -> Product:
        """The product named ``"output"``, ``"grad_input"`` or ``"grad_weight"``."""
        value = getattr(self, name)
        assert isinstance(value, Product)
        return value

    @property
    def name(self) -> str:
        """The name of a named recipe, else the three precisions."""
        for name, recipe in RECIPES.items():
            if (self.output, self.grad_input, self.grad_weight) == (
                recipe.output, recipe.grad_input, recipe.grad_weight,
            ):
                return name
        return "/".join(self.product(name).precision for name in _PRODUCTS)


RECIPES = {
    "fp32": Recipe("fp32", "fp32", "fp32"),
    "fp16": Recipe("fp16", "fp16", "fp16"),
    "bf16": Recipe("bf16", "bf16", "bf16"),
    "int8": Recipe("int8", "int8", "bf16"),
    "int8_full": Recipe("int8", "int8", "int8"),
}
"""``int8`` keeps the weight gradient in 16 bits, the product that tolerates int8 least (Wortsman et
al., "Stable and low-precision training", NeurIPS 2023, section 2: SwitchBack)."""


def recipe_of(precision: str | int | Recipe) -> Recipe:
    """The recipe that ``precision`` names.

    Args:
        precision: a name (``fp32 fp16 bf16 int8 int8_full``), bits (32, 16: fp16, 8), or a recipe.

    Raises:
        ValueError: an unknown name or number. TypeError: another type.
    """
    if isinstance(precision, Recipe):
        return precision
    if isinstance(precision, int) and not isinstance(precision, bool):
        name = _BITS.get(precision, str(precision))
    elif isinstance(precision, str):
        name = precision
    else:
        raise TypeError(
            "lowp: precision must be a name, 32, 16, 8 or a lowp.Recipe, "
            f"got {type(precision).__name__}"
        )
    if name not in RECIPES:
        raise ValueError(
            f"lowp: precision must be one of {', '.join(RECIPES)}, 32, 16, 8 or a lowp.Recipe, "
            f"got {precision!r}"
        )
    return RECIPES[name]
