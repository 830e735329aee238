"""The products of a batch over stacks of low-rank pairs (see lorakit.core.batched, which chooses among them).

Each way adds to y (tokens, out), contiguous, in place, what some tokens of x (tokens, in) get from their pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Way = Callable[[Tensor, Tensor], object]


class Lines:
    """Tokens in order, `depth` neighbours a line, with a pair a line, as batched products. Nothing is copied.

    At: (count, in, rank), Bt: (count, rank, out); tokens: from, to, None = all; scale: of all, or scales: (count, 1, 1).
    """

    __slots__ = ("At", "Bt", "lead", "scale", "scales", "tokens")

    def __init__(
        self, At: Tensor, Bt: Tensor, depth: int, tokens: tuple[int, int] | None, scale: float, scales: Tensor | None
    ) -> None:
        self.At, self.Bt, self.lead, self.tokens, self.scale, self.scales = (
            At, Bt, (len(At), depth), tokens, scale, scales,
        )  # fmt: skip

    def __call__(self, y: Tensor, x: Tensor) -> None:
        if self.tokens is not None:
            start, end = self.tokens
            x, y = x[start:end], y[start:end]
        self.add_(y.view(*self.lead, -1), x.view(*self.lead, -1))

    def add_(self, y: Tensor, x: Tensor) -> None:
        """y: (count, depth, out), x: (count, depth, in)."""
        inner = torch.bmm(x, self.At)
        if self.scales is None:
            y.baddbmm_(inner, self.Bt, alpha=self.scale)
        else:  # strict has these bits in lines and gathered
            y.add_(torch.bmm(inner.mul_(self.scales), self.Bt))


class Bound:
    """The ways of one step with one stack, their views of it made.

    rescale: DoRA's gains and biases, (y, bias) -> None. lines: the one way, where it is this and takes all tokens.
    """

    __slots__ = ("rescale", "ways")

    def __init__(self) -> None:
        self.rescale: Callable[[Tensor, Tensor | None], None] | None = None
        self.ways: list[Way] = []

    @property
    def lines(self) -> Lines | None:
        if self.rescale is not None or len(self.ways) != 1:
            return None
        (way,) = self.ways
        return way if isinstance(way, Lines) and way.tokens is None else None

    def add_(self, y: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """bias: the layer's own."""
        if self.rescale is not None:
            self.rescale(y, bias)
        for way in self.ways:
            way(y, x)


@dataclass(slots=True)
class Grid:
    """Pairs of one rank that stand side by side, `count` of them from row `start`, each with `depth` places for tokens.

    scale: of all, or scales: (count, 1, 1). ordered: whether the tokens fill the places in order, the tokens from `tokens`
    (None = all); else take: (count depth,) the token of each place, back: (n,) each token's place, where: (n,) None = all.
    """

    start: int
    rank: int
    count: int
    depth: int
    scale: float = 1.0
    scales: Tensor | None = None
    ordered: bool = False
    tokens: tuple[int, int] | None = None
    take: Tensor | None = None
    back: Tensor | None = None
    where: Tensor | None = None

    def bound(self, A: Tensor, Bt: Tensor) -> Way:
        """The way with a stack's A (rows, in) and Bt (rows, out)."""
        rows = slice(self.start, self.start + self.count * self.rank)
        At, up = A[rows].view(self.count, self.rank, -1).transpose(1, 2), Bt[rows].view(self.count, self.rank, -1)
        if self.ordered:
            return Lines(At, up, self.depth, self.tokens, self.scale, self.scales)
        return partial(scattered, self, At, up)


@dataclass(slots=True)
class Bucket:
    """Single tokens with pairs of one rank. where: the tokens (n,), None = all; rows: (n r,) of the stack; scales: (n, 1, 1)."""

    where: Tensor | None
    rows: Tensor
    rank: int
    scales: Tensor


def run(start: int, end: int, At: Tensor, Bt: Tensor, scale: float, y: Tensor, x: Tensor) -> None:
    """One pair for the tokens from `start` to `end`."""
    y[start:end].addmm_(x[start:end].mm(At), Bt, alpha=scale)


def scattered(one: Grid, At: Tensor, Bt: Tensor, y: Tensor, x: Tensor) -> None:
    """As Lines, of tokens that are first put into their places."""
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
    """DoRA's gain, less 1, on the base's product, and what adapters add to the bias.

    gains, shifts: (members + 1, out); owner: (tokens,), a row of them.
    """
    if gains is not None:
        plain = y if bias is None else y - bias.to(y.dtype)
        y.addcmul_(plain, gains[owner])
    if shifts is not None:
        y.add_(shifts[owner])
