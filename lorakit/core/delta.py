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


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor holds its values as plain floating-point numbers (a quantised weight does not)."""
    return tensor.is_floating_point() and type(tensor) in (torch.nn.Parameter, Tensor)


def delta_weight(A: Tensor, Bt: Tensor, scale: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * B A` as a full `(out, in)` matrix, computed in `dtype`. A: (r, in); Bt: (r, out)."""
    return (Bt.to(dtype).t() @ A.to(dtype)).mul_(scale)


def spread_parts(Bt: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """The block form of a fused projection's B. Bt: (r, n out / len(parts)) -> (n r, out), n the adapted parts.

    Rows i r to (i + 1) r reach the i-th adapted part alone, so that each part has a pair of its own (loralib's MergedLinear).
    """
    count = sum(parts)
    blocks = Bt.chunk(count, dim=1)  # (r, part) each
    columns = [blocks[sum(parts[:i])] if on else None for i, on in enumerate(parts)]
    empty = Bt.new_zeros(Bt.shape[0], blocks[0].shape[1])
    rows = [
        torch.cat([empty if j != i or column is None else column for j, column in enumerate(columns)], dim=1)
        for i, on in enumerate(parts)
        if on
    ]
    return torch.cat(rows, dim=0)


def join_fixed(A: Tensor, Bt: Tensor, fixed_a: Tensor, fixed_bt: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of rank 2 r whose product is `B A - fixed_B fixed_a`."""
    return torch.cat([A, fixed_a.to(A.dtype)]), torch.cat([Bt, -fixed_bt.to(Bt.dtype)])


def output_norms(weight: Tensor, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
    """`||W + scale B A||` of each output, (out,) (DoRA, section 4.3). weight: (out, in), of which no copy is made.

    By `|w + d|^2 = |w|^2 + 2 w d + |d|^2` from products r wide: the sum, a matrix as large as W, is never formed.
    """
    dtype = torch.promote_types(wide(A.dtype), wide(weight.dtype))
    A, Bt = A.to(dtype), Bt.to(dtype)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    cross = (Bt * (A.to(weight.dtype) @ weight.t()).to(dtype)).sum(0)
    update = (Bt * ((A @ A.t()) @ Bt)).sum(0)
    square: Tensor = own + 2 * scale * cross + scale * scale * update
    return square.clamp_min(0).sqrt()


def expert_delta(A: Tensor, Bt: Tensor, experts: int, scale: float | Tensor, *, transposed: bool) -> Tensor:
    """The update of a stack of experts' weights, (E, out, in), or (E, in, out) where `transposed`.

    A: (E r, in), expert-major; Bt: (r E, out), expert-minor (PEFT's layout).
    """
    a = A.view(experts, -1, A.shape[1])  # (E, r, in)
    bt = Bt.view(-1, experts, Bt.shape[1]).transpose(0, 1)  # (E, r, out)
    product = a.transpose(1, 2) @ bt if transposed else bt.transpose(1, 2) @ a
    return product * scale


def low_rank(x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    """`(x A^T) B^T` in x's dtype (autocast decides where it is on). x: (..., in) -> (..., out).

    The factors are cast, never x: they are small.
    """
    return (x @ A.to(x.dtype).t()) @ Bt.to(x.dtype)


def add_low_rank_(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, scale: float) -> Tensor:
    """`y += scale * (x A^T) B^T` in place and without gradients. x: (..., in); y: (..., out), contiguous."""
    A, Bt = A.to(y.dtype), Bt.to(y.dtype)
    xa = x.reshape(-1, x.shape[-1]) @ A.t()  # (tokens, r)
    y.view(-1, y.shape[-1]).addmm_(xa, Bt, alpha=scale)
    return y


def low_rank_lookup(ids: Tensor, At: Tensor, Bt: Tensor, padding_idx: int | None = None) -> Tensor:
    """The update of an embedding's rows: `At[ids] Bt`. ids: (...) -> (..., dim); At: (vocab, r); Bt: (r, dim).

    padding_idx: a row that gets no gradient, as in the base.
    """
    return torch.nn.functional.embedding(ids, At, padding_idx) @ Bt.to(At.dtype)


def guarded(delta: Tensor, mark: Tensor, epoch: int) -> Tensor:
    """`delta`, whose backward raises when a checkpoint's recompute ran with other adapters (see EpochGuard)."""
    return EpochGuard.apply(delta, mark, epoch)  # type: ignore[no-any-return,no-untyped-call]
