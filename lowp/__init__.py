"""lowp: low-precision training for PyTorch, with the same bits on every backend."""

from lowp.backend import backend
from lowp.key import Key
from lowp.quantized import Quantized, dequantize, quantize
from lowp.recipe import Operand, Product, Recipe

__version__ = "0.1.0"

__all__ = [
    "Key",
    "Operand",
    "Product",
    "Quantized",
    "Recipe",
    "__version__",
    "backend",
    "dequantize",
    "quantize",
]
