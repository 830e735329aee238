"""The low-rank update `dW = scale * B A` (LoRA, section 4.1) and its product with an input.

Layout: A is kept as `(r, in)` and B *transposed*, as `Bt (r, out)`: both gradients and both products then run along
contiguous rows, which makes B's gradient twice as cheap on a CPU at r=8 as with `(out, r)` (docs/benchmarks.md).
"""

import torch
from torch import Tensor

from lorakit.core.autograd import EpochGuard


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which an update is added to a weight of `dtype`: float32, or float64 for a float64 weight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_weight(A: Tensor, Bt: Tensor, scale: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * B A` as a full `(out, in)` matrix, computed in `dtype`. A: (r, in); Bt: (r, out)."""
    return (Bt.to(dtype).t() @ A.to(dtype)).mul_(scale)


def low_rank(x: Tensor, A: Tensor, Bt: Tensor, scale: float | Tensor) -> Tensor:
    """`scale * (x A^T) B^T` in x's dtype (autocast decides where it is on). x: (..., in) -> (..., out).

    The factors are cast, never x: they are small.
    """
    return ((x @ A.to(x.dtype).t()) @ Bt.to(x.dtype)) * scale


def add_low_rank_(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
    """`y += scale * (x A^T) B^T` in place and without gradients. x: (..., in); y: (..., out), contiguous."""
    A, Bt = A.to(y.dtype), Bt.to(y.dtype)
    xa = x.reshape(-1, x.shape[-1]) @ A.t()  # (tokens, r)
    y.view(-1, y.shape[-1]).addmm_(xa, Bt, alpha=scale)
    return y


def low_rank_lookup(ids: Tensor, At: Tensor, Bt: Tensor, scale: float | Tensor) -> Tensor:
    """The update of an embedding's rows: `scale * At[ids] Bt`. ids: (...) -> (..., dim); At: (vocab, r); Bt: (r, dim)."""
    return (torch.nn.functional.embedding(ids, At) @ Bt) * scale


def guarded(delta: Tensor, mark: Tensor, epoch: int) -> Tensor:
    """`delta`, whose backward raises when a checkpoint's recompute ran with other adapters (see EpochGuard)."""
    return EpochGuard.apply(delta, mark, epoch)  # type: ignore[no-any-return,no-untyped-call]
