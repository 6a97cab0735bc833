"""lowp: low-precision training for PyTorch, with the same bits on every backend."""

from lowp import optim, testing
from lowp.backend import backend
from lowp.convert import convert, plan, revert
from lowp.explanation import explain
from lowp.key import Key
from lowp.linear import Linear, linear
from lowp.low_rank import LowRankLinear, factorize, merge
from lowp.lstm import LSTM
from lowp.mlp import MLP, mlp
from lowp.quantized import Quantized, dequantize, quantize
from lowp.recipe import Operand, Product, Recipe
from lowp.report import report

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "MLP",
    "Key",
    "Linear",
    "LowRankLinear",
    "Operand",
    "Product",
    "Quantized",
    "Recipe",
    "__version__",
    "backend",
    "convert",
    "dequantize",
    "explain",
    "factorize",
    "linear",
    "merge",
    "mlp",
    "optim",
    "plan",
    "quantize",
    "report",
    "revert",
    "testing",
]
