"""How far from 0 the values of many tensors go, found without a copy of them."""

from collections.abc import Sequence
from math import isnan, nan

from torch import Tensor


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value in floating-point tensors; 0 of none, NaN where one of the values is NaN."""
    ends = [abs(float(end)) for tensor in tensors if tensor.numel() for end in _ends(tensor)]
    return nan if any(map(isnan, ends)) else max(ends, default=0.0)


def _ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value; a NaN makes both NaN."""
    return (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()  # 8 bits have no arithmetic
