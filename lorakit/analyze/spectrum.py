"""Singular values of `dW = scale * B A` from its factors, and the figures made of them.

With `A^T = Qa Ra` and `B = Qb Rb` (QR) the update is `Qb (scale Rb Ra^T) Qa^T`: the singular values are those of the small
matrix in the middle, (r, r), and its singular vectors times Qb and Qa are the update's. All in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.analyze.updates import Update

BATCH = 16  # factors of one shape that are decomposed together: their float64 copies fit in a cache or so
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Directions:
    """Singular values and vectors of a matrix (out, in). left: (out, k), values: (k,), right: (in, k); float64."""

    left: Tensor
    values: Tensor
    right: Tensor

    def top(self, k: int) -> "Directions":
        """The k largest."""
        return Directions(self.left[:, :k], self.values[:k], self.right[:, :k])


def singular_values(updates: Sequence[Update]) -> list[Tensor]:
    """The singular values of each update, (min(r, out, in),) in falling order, float64."""
    triangles_a = _triangles([update.a.t() for update in updates])
    triangles_b = _triangles([update.b for update in updates])
    found: list[Tensor] = []
    for update, ra, rb in zip(updates, triangles_a, triangles_b, strict=True):
        values = torch.linalg.svdvals(rb @ ra.t()) * abs(update.scale)
        found.append(values[: min(*update.shape, update.rank)])
    return found


def _triangles(matrices: Sequence[Tensor]) -> list[Tensor]:
    """R of the QR of each matrix (n, r), equal shapes together."""
    groups: dict[torch.Size, list[int]] = {}
    for at, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(at)
    found: dict[int, Tensor] = {}
    for group in groups.values():
        for some in _runs(group):
            r = torch.linalg.qr(torch.stack([matrices[at].double() for at in some]), mode="r").R
            found |= dict(zip(some, r, strict=True))
    return [found[at] for at in range(len(matrices))]


def _runs(items: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def directions(update: Update) -> Directions:
    """The update's singular values and vectors, as many as its numerical rank (`numerical_rank`)."""
    qa, ra = torch.linalg.qr(update.a.t().double())
    qb, rb = torch.linalg.qr(update.b.double())
    u, s, vh = torch.linalg.svd(rb @ ra.t() * update.scale, full_matrices=False)
    whole = Directions(qb @ u, s, qa @ vh.t())
    return whole.top(numerical_rank(s))


def numerical_rank(values: Tensor) -> int:
    """How many singular values stand above rounding: over `n * eps * largest`, n their number, eps float32's (1.2e-7),
    which is how exactly a product of float32 factors of that rank holds its own zeros. values: falling, (n,)."""
    if not values.numel():
        return 0
    return int((values > values.numel() * EPSILON * values[0]).sum())


def effective_rank(values: Tensor) -> float:
    """`exp(-sum p ln p)` with p = s / sum s (Roy, Vetterli 2007): between 1 and the rank, which equal values reach; 0 for 0."""
    share = values / values.sum() if values.sum() > 0 else values[:0]
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum())) if share.numel() else 0.0


def stable_rank(values: Tensor) -> float:
    """`||dW||_F^2 / ||dW||_2^2`, the sum of squares over the largest of them: between 1 and the rank; 0 for 0."""
    return float((values / values[0]).square().sum()) if values.numel() and values[0] > 0 else 0.0


def energy(values: Tensor) -> Tensor:
    """`(s_1^2 + ... + s_k^2) / ||dW||_F^2` for k = 1 ... n: the share of the update that its best approximation of rank k keeps.
    All ones for a zero update, of which nothing can be lost."""
    squares = values.square().cumsum(0)
    return squares / squares[-1] if squares.numel() and squares[-1] > 0 else torch.ones_like(values)


def rank_for(values: Tensor, share: float) -> int:
    """The smallest rank that keeps `share` of the energy, at least 1. For 1.0: all that stands above rounding."""
    if share >= 1:
        return max(1, numerical_rank(values))
    return 1 + int((energy(values) < share).sum())
