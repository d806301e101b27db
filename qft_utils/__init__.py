"""The small package behind the book *Fine-Tuning Quantized Models in PyTorch*."""

from qft_utils import compat

__all__ = ["compat"]
__version__ = "0.1.0"
