"""Convolutions of one, two and three dimensions, with stride, padding, dilation and groups.

A is a convolution of the layer's own kernel into r channels, B one of kernel 1 out of them: the composition is the
layer's convolution with `sum over j of B[o, j] A[j, i, k]` as its kernel, whatever the kernel's size. With groups both
are grouped alike (r channels split between the groups), so the update has the weight's own shape and can be merged.
PEFT's A is dense over all groups' inputs there: such a file is taken as it is, and merging it is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kinds.base import LeafKind
from lorakit.core.delta import wide
from lorakit.errors import AdapterError, TargetError

_FUNCTIONS: Any = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class ConvKind(LeafKind):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d: weight (out, in / groups, *kernel)."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def shape(self, leaf: nn.Module) -> tuple[int, int]:
        return leaf.in_channels, leaf.out_channels  # type: ignore[return-value]

    def factor_shapes(self, leaf: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        groups: int = leaf.groups  # type: ignore[assignment]
        if r % groups:
            raise TargetError(
                f"a {type(leaf).__name__} with groups={groups} takes a rank that is a multiple of {groups}, not r={r}: each "
                "group has r / groups of it. Choose another r (rank_pattern for this layer alone), or leave the layer out."
            )
        d_in, d_out = self.shape(leaf)
        return (r, d_in // groups, *leaf.kernel_size), (r // groups, d_out)  # type: ignore[misc]

    def row_width(self, x: Tensor) -> int:
        return self.dimensions + 1

    def along_weight(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (self.dimensions + 1))

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        return vector.view(-1, *[1] * self.dimensions)

    def dropped(self, x: Tensor, dropout: float) -> Tensor:
        return nn.functional.dropout(x, dropout)

    def product(self, leaf: Any, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        inner = self._convolved(leaf, x, A.to(x.dtype), leaf.in_channels // A.shape[1])
        kernel = Bt.to(x.dtype).t()[(..., *[None] * self.dimensions)]  # (out, r / groups, 1, ...)
        return _FUNCTIONS[self.dimensions](inner, kernel, groups=leaf.groups)  # type: ignore[no-any-return]

    def plain_product(self, leaf: Any, x: Tensor) -> Tensor:
        weight: Any = leaf.weight
        return self._convolved(leaf, x, weight.to(x.dtype), leaf.groups)

    def norms(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
        weight: Any = leaf._parameters["weight"]
        dtype = torch.promote_types(wide(A.dtype), wide(weight.dtype))
        delta = self.weight_delta(leaf, A, Bt, scale, dtype)
        norms: Tensor = torch.linalg.vector_norm(weight.to(dtype) + delta, dim=tuple(range(1, weight.dim())))
        return norms

    def weight_delta(self, leaf: nn.Module, A: Tensor, Bt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        groups: Any = leaf.groups
        weight: Any = leaf._parameters["weight"]
        if A.shape[1] != weight.shape[1]:
            raise AdapterError(
                f"this adapter's A reaches across the {groups} groups of a {type(leaf).__name__} (PEFT writes such files), "
                f"which the layer's own weight {list(weight.shape)} cannot hold: it can be used, but neither merged nor normed."
            )
        a = A.to(dtype).reshape(groups, A.shape[0] // groups, -1)  # (g, r / g, in / g * kernel)
        b = Bt.to(dtype).t().reshape(groups, weight.shape[0] // groups, -1)  # (g, out / g, r / g)
        return (b @ a).reshape(weight.shape).mul_(scale)

    def _convolved(self, leaf: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """x through a convolution with the leaf's geometry."""
        padding = leaf.padding
        if leaf.padding_mode != "zeros":
            x = nn.functional.pad(x, leaf._reversed_padding_repeated_twice, mode=leaf.padding_mode)
            padding = 0
        convolve = _FUNCTIONS[self.dimensions]
        return convolve(  # type: ignore[no-any-return]
            x, weight, stride=leaf.stride, padding=padding, dilation=leaf.dilation, groups=groups
        )
