"""Dropout masks that cost little on a CPU, from torch's own generator: a seed, a checkpoint's recompute and a resumed run
give the same masks.

`nn.functional.dropout` draws one double an element from a serial generator, which costs more than the low-rank products
that it is for. Where few elements are dropped, the distances from one to the next are drawn instead, which are geometrically
distributed; else 16 random bits an element, four elements a draw. A mask is of int8, since torch turns that into floats
seven times as fast as bool, and compares int16 in place six times as fast as into bool (LOG.md, 2026-11-30 and 12-01).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEVELS = 2**16
FEW = 1 / 8  # probabilities up to which distances cost less than bits
TINY = 2.0**-40  # no tensor has as many elements as this makes of distances
MARGIN = 6  # standard deviations of the number dropped, above its mean, that are drawn at once


def keep_mask(like: Tensor, probability: float) -> tuple[Tensor, float]:
    """(mask, factor): int8, 1 where an entry of a tensor shaped as `like` stays and 0 where not; 1 / the share that does.

    probability: of an entry to go, in [0, 1); rounded to a multiple of 2^-16 above FEW, and on a GPU.
    """
    if like.device.type == "cpu" and probability <= FEW:
        mask = torch.ones(like.numel(), dtype=torch.int8, device="cpu")
        return mask.index_fill_(0, _dropped(like.numel(), probability), 0).view(like.shape), 1 / (1 - probability)
    drop = min(round(probability * LEVELS), LEVELS - 1)
    if like.device.type != "cpu":
        stays = torch.rand_like(like, dtype=torch.float32) >= drop / LEVELS
        return stays.view(torch.int8), LEVELS / (LEVELS - drop)
    count = like.numel()
    bits = torch.empty(-(-count // 4) or 1, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    mask = bits.view(torch.int16)[:count].view(like.shape).ge_(drop - LEVELS // 2)  # int16 runs from -2^15
    return mask.to(torch.int8), LEVELS / (LEVELS - drop)


def _dropped(count: int, probability: float) -> Tensor:
    """The numbers, ascending, of those of `count` elements that go, each with this probability (below 1).

    A distance is drawn from 16 bits, so each of its probabilities is a multiple of 2^-16; the share that goes is right within
    a hundred-thousandth of itself.
    """
    rarest = max(probability, TINY)
    expected = count * rarest
    enough = int(expected + MARGIN * math.sqrt(expected)) + 8
    parts, last = [], -1
    while last < count:  # a second time hardly ever
        bits = torch.empty(-(-enough // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
        uniform = (
            bits.view(torch.int16).to(torch.float32).add_((LEVELS + 1) / 2).div_(LEVELS)
        )  # in (0, 1), never an end
        distances = uniform.log_().div_(math.log1p(-rarest)).add_(1).to(torch.int64)  # from 1 on
        distances[0] += last
        parts.append(distances.cumsum_(0))
        last = int(parts[-1][-1])
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found[: int(torch.searchsorted(found, count))]


def without(x: Tensor, drawn: Tensor | None) -> Tensor:
    """x with zeros where entries go, contiguous; x itself where nothing was drawn. drawn: of `draw`."""
    if drawn is None:
        return x
    if drawn.dtype == torch.int8:
        return drawn.to(x.dtype).mul_(x)
    return zeroed_(x.clone(memory_format=torch.contiguous_format), drawn)


def add_where_kept_(onto: Tensor, left: Tensor, right: Tensor, drawn: Tensor) -> Tensor:
    """`onto += left right` but where entries go. onto: (n, m), contiguous; left: (n, r); right: (r, m); drawn: of `draw`."""
    if drawn.dtype == torch.int8:
        return onto.addcmul_(left @ right, drawn.to(onto.dtype))
    return onto.add_(zeroed_(left @ right, drawn))


def dropped(x: Tensor, probability: float) -> Tensor:
    """`nn.functional.dropout(x, probability)` in training, by these masks. x: any shape, on the CPU; probability: in [0, 1)."""
    return Dropped.apply(x, probability)  # type: ignore[no-any-return,no-untyped-call]


class Dropped(torch.autograd.Function):
    """See dropped. Kept for backward: the numbers of the entries that go, or a mask of a byte an entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        drawn, ctx.factor = draw(x, probability)
        ctx.save_for_backward(drawn)
        return zeroed_(_scaled(x, ctx.factor), drawn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return zeroed_(_scaled(dy, ctx.factor), *ctx.saved_tensors), None


def draw(like: Tensor, probability: float) -> tuple[Tensor, float]:
    """(which entries go, 1 / the share that stays), for a tensor on the CPU that is shaped as `like`: their numbers in it when
    flattened, int64, where few do; else keep_mask's mask. On the meta device: as many as are expected."""
    if like.is_meta and probability <= FEW:
        return like.new_empty(round(like.numel() * probability), dtype=torch.int64), 1 / (1 - probability)
    if like.device.type == "cpu" and probability <= FEW:
        return _dropped(like.numel(), probability), 1 / (1 - probability)
    return keep_mask(like, probability)


def zeroed_(x: Tensor, drawn: Tensor) -> Tensor:
    """x, contiguous, with zeros written where entries go. drawn: of `draw`."""
    if drawn.dtype == torch.int8:
        return x.mul_(drawn)
    if torch.are_deterministic_algorithms_enabled():  # put_ is refused then, for numbers that stand twice: none do
        x.view(-1).index_fill_(0, drawn, 0)
        return x
    return x.put_(drawn, x.new_zeros(len(drawn)))  # 0.6 of index_fill_'s time for 30,000 numbers


def _scaled(x: Tensor, factor: float) -> Tensor:
    """`x * factor`, contiguous."""
    return torch.mul(x, factor, out=torch.empty_like(x, memory_format=torch.contiguous_format))
