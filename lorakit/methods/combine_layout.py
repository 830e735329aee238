"""Pairs of every kind of layer as stacks of blocks (see lorakit.methods.combine_maths), and back."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import ConvKind, EmbeddingKind, low_rank_kind
from lorakit.attach.method import Pair
from lorakit.methods.start import raw_shape


@dataclass(frozen=True)
class Layout:
    """How the pairs of one leaf (or raw parameter) are laid out.

    blocks: E. tail: the shape of a row of A. minor: whether B has its blocks beside the ranks, (r E, out), as experts do,
    or beside the outputs, (r, E out), as the groups of a convolution. device: the weight's.
    """

    blocks: int
    tail: tuple[int, ...]
    device: torch.device
    flipped: bool = False  # an embedding: A is (vocab, r)
    minor: bool = False

    @property
    def groups(self) -> int:
        """Of how many a configuration's rank is the sum: a convolution's groups share it, experts have it each."""
        return 1 if self.minor else self.blocks

    def opened(self, pair: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a, b), (E, r, in) and (E, r, out), of a pair, computed in `dtype`."""
        A, Bt = (factor.detach().to(self.device, dtype) for factor in pair.factors())
        if self.flipped:
            return A.t()[None], Bt[None]
        a = A.reshape(self.blocks, A.shape[0] // self.blocks, *A.shape[1:])
        if not self.minor and a.shape[2:] != self.tail:  # grouped among others that reach across the groups
            a = self._spread(a)
        a = a.flatten(2)
        if self.minor:
            return a, Bt.reshape(-1, self.blocks, Bt.shape[1]).transpose(0, 1)
        return a, Bt.reshape(Bt.shape[0], self.blocks, -1).transpose(0, 1)

    def closed(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The opposite of `opened`: (A, Bt) in memory of their own, rounded to `dtype`."""
        if self.flipped:
            A, Bt = a[0].t(), b[0]
        else:
            A, Bt = a.reshape(-1, *self.tail), b.transpose(0, 1)  # (r, E, out)
            Bt = Bt.reshape(-1, Bt.shape[2]) if self.minor else Bt.reshape(Bt.shape[0], -1)
        return tuple(half.to(dtype).contiguous().clone() for half in (A, Bt))  # type: ignore[return-value]

    def _spread(self, a: Tensor) -> Tensor:
        """Rows that see their own group's channels, as rows that see all: zeros for the others. a: (E, r, in / E, ...)."""
        wide = a.new_zeros(self.blocks, a.shape[1], self.blocks, *a.shape[2:])
        each = torch.arange(self.blocks, device=a.device)
        wide[each, :, each] = a
        return wide.flatten(2, 3)


def leaf_layout(leaf: nn.Module, pairs: list[Pair]) -> Layout:
    """The layout of a layer's pairs; the widest one's where some A of a grouped convolution reach across its groups."""
    kind = low_rank_kind(plain(type(leaf)))
    device: Any = leaf._parameters["weight"].device  # type: ignore[union-attr]
    if isinstance(kind, EmbeddingKind):
        return Layout(1, (pairs[0].A.shape[0],), device, flipped=True)
    tail = max((tuple(pair.A.shape[1:]) for pair in pairs), key=math.prod)
    groups: Any = leaf.groups if isinstance(kind, ConvKind) else 1
    return Layout(groups, tail, device)


def raw_layout(module: nn.Module, name: str) -> Layout:
    """The layout of the pairs on a parameter that its module reads itself."""
    parameter: Tensor = module._parameters[name]  # type: ignore[assignment]
    experts, d_in, _ = raw_shape(module, parameter)
    return Layout(experts, (d_in,), parameter.device, minor=True)
