"""The products of a batch over stacks of low-rank pairs (see lorakit.core.batched, which chooses among them).

Each way adds to y (tokens, out), contiguous, in place, what some tokens of x (tokens, in) get from their pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Way = Callable[[Tensor, Tensor], object]


class Bound:
    """The ways of one step with one stack, their views of it made. rescale: DoRA's gains and biases, (y, bias) -> None."""

    __slots__ = ("rescale", "ways")

    def __init__(self) -> None:
        self.rescale: Callable[[Tensor, Tensor | None], None] | None = None
        self.ways: list[Way] = []

    def add_(self, y: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """bias: the layer's own."""
        if self.rescale is not None:
            self.rescale(y, bias)
        for way in self.ways:
            way(y, x)


@dataclass(slots=True)
class Grid:
    """Pairs of one rank that stand side by side, `count` of them from row `start`, each with `depth` places for tokens.

    scale: of all, or scales: (count, 1, 1). tokens: from, to, where they fill the places in order; else take: (count depth,)
    the token of each place, back: (n,) the place of each token, where: (n,) the tokens, None = all.
    """

    start: int
    rank: int
    count: int
    depth: int
    scale: float = 1.0
    scales: Tensor | None = None
    tokens: tuple[int, int] | None = None
    take: Tensor | None = None
    back: Tensor | None = None
    where: Tensor | None = None

    def views(self, A: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
        """(count, in, rank) and (count, rank, out) of a stack's A and Bt."""
        rows = slice(self.start, self.start + self.count * self.rank)
        return A[rows].view(self.count, self.rank, -1).transpose(1, 2), Bt[rows].view(self.count, self.rank, -1)


@dataclass(slots=True)
class Bucket:
    """Single tokens with pairs of one rank. where: the tokens (n,), None = all; rows: (n r,) of the stack; scales: (n, 1, 1)."""

    where: Tensor | None
    rows: Tensor
    rank: int
    scales: Tensor


def alone(At: Tensor, Bt: Tensor, scale: float, y: Tensor, x: Tensor) -> None:
    """One pair for all tokens. At: (in, r), Bt: (r, out)."""
    y.addmm_(x.mm(At), Bt, alpha=scale)


def run(start: int, end: int, At: Tensor, Bt: Tensor, scale: float, y: Tensor, x: Tensor) -> None:
    """One pair for the tokens from `start` to `end`."""
    y[start:end].addmm_(x[start:end].mm(At), Bt, alpha=scale)


def grid(one: Grid, At: Tensor, Bt: Tensor, y: Tensor, x: Tensor) -> None:
    """A pair a line of the grid. At: (count, in, rank), Bt: (count, rank, out)."""
    if one.tokens is None:
        _out_of_order(one, At, Bt, y, x)
        return
    start, end = one.tokens
    if end - start < len(x):
        x, y = x[start:end], y[start:end]
    inner = torch.bmm(x.view(one.count, one.depth, -1), At)  # (count, depth, rank)
    lines = y.view(one.count, one.depth, -1)
    if one.scales is None:
        lines.baddbmm_(inner, Bt, alpha=one.scale)
    else:  # strict has these bits in a grid, out of order, and gathered
        lines.add_(torch.bmm(inner.mul_(one.scales), Bt))


def _out_of_order(one: Grid, At: Tensor, Bt: Tensor, y: Tensor, x: Tensor) -> None:
    if one.take is None or one.back is None:
        raise TypeError("a grid whose tokens are out of order says where they are")
    inner = torch.bmm(x.index_select(0, one.take).view(one.count, one.depth, -1), At)
    if one.scales is not None:
        inner.mul_(one.scales)
    delta = torch.bmm(inner, Bt).view(-1, y.shape[1]).index_select(0, one.back)
    if one.where is None:
        y.add_(delta, alpha=one.scale)
    else:
        y.index_add_(0, one.where, delta, alpha=one.scale)


def masked(At: Tensor, Bt: Tensor, mask: Tensor, where: Tensor | None, y: Tensor, x: Tensor) -> None:
    """Every pair for every token, times what is none of its own or its scale. mask: (n, ranks)."""
    if where is None:
        y.addmm_(x.mm(At).mul_(mask), Bt)
    else:
        y.index_add_(0, where, (x[where] @ At).mul_(mask) @ Bt)


def gathered(A: Tensor, Bt: Tensor, bucket: Bucket, y: Tensor, x: Tensor) -> None:
    """Each token times the pair gathered for it. A: (rows, in), Bt: (rows, out)."""
    own = x if bucket.where is None else x[bucket.where]
    down = A.index_select(0, bucket.rows).view(len(own), bucket.rank, -1)  # (n, r, in)
    up = Bt.index_select(0, bucket.rows).view(len(own), bucket.rank, -1)  # (n, r, out)
    inner = torch.bmm(own[:, None], down.transpose(1, 2)).mul_(bucket.scales)  # (n, 1, r)
    delta = torch.bmm(inner, up)[:, 0]
    if bucket.where is None:
        y.add_(delta)
    else:
        y.index_add_(0, bucket.where, delta)


def rescaled(gains: Tensor | None, shifts: Tensor | None, owner: Tensor, y: Tensor, bias: Tensor | None) -> None:
    """DoRA's gain, less 1, on the base's product, and what adapters add to the bias. Tables (members + 1, out); owner: (tokens,)."""
    if gains is not None:
        plain = y if bias is None else y - bias.to(y.dtype)
        y.addcmul_(plain, gains[owner])
    if shifts is not None:
        y.add_(shifts[owner])
