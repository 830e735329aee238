"""Similarity of subspaces (section 7.2 and appendix G).

`phi(A, B, i, j) = ||U_A[:, :i]^T U_B[:, :j]||_F^2 / min(i, j)`, between 0 (orthogonal) and 1 (one lies in the other). With d the
projection distance of appendix G and p = min(i, j): `phi = 1 - d^2 / p` (printed there as 1/p (1 - d^2), a misprint).
For Gaussian matrices on n inputs it is near `max(i, j) / n`.
"""

from functools import lru_cache

import torch
from torch import Tensor


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi for every i and j. first: (n, I), second: (n, J), orthonormal columns, largest first -> (I, J) in [0, 1]."""
    squares = (first.t() @ second).square().cumsum(0).cumsum(1)
    i = torch.arange(1, first.shape[1] + 1, dtype=squares.dtype)[:, None]
    j = torch.arange(1, second.shape[1] + 1, dtype=squares.dtype)[None, :]
    return (squares / torch.minimum(i, j)).clamp(0, 1)


def distance(first: Tensor, second: Tensor) -> float:
    """The projection distance of appendix G, `sqrt(p - sum cos^2)` over the p = min(i, j) principal angles, taken from their
    sines, so that it is exact for subspaces that nearly agree too. first: (n, i), second: (n, j), orthonormal columns."""
    narrow, wide = (first, second) if first.shape[1] <= second.shape[1] else (second, first)
    return float(torch.linalg.matrix_norm(narrow - wide @ (wide.t() @ narrow)))


@lru_cache(maxsize=16)
def random_basis(n: int, k: int, seed: int) -> Tensor:
    """The first k singular directions of a Gaussian matrix on n inputs: k orthonormal columns drawn evenly, (n, k)."""
    generator = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return basis


def random_similarity(n: int, i: int, j: int) -> Tensor:
    """The control: phi between two Gaussian matrices, (i, j); the same numbers each time."""
    return similarity(random_basis(n, i, 1), random_basis(n, j, 2))
