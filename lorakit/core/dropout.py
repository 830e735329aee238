"""Dropout masks that cost little on a CPU: 16 random bits an element, four elements a draw.

`nn.functional.dropout` draws one double an element from a serial generator, which costs more than the low-rank products
that it is for. The probability is rounded to a multiple of 2^-16. The draws come from torch's own generator: a seed, a
checkpoint's recompute and a resumed run give the same masks. A mask is of int8, since torch turns that into floats seven
times as fast as bool, and compares int16 in place six times as fast as into bool (LOG.md, 2026-11-30).
"""

import torch
from torch import Tensor

LEVELS = 2**16


def keep_mask(like: Tensor, probability: float) -> tuple[Tensor, float]:
    """(mask, factor): int8, 1 where an entry of a tensor shaped as `like` stays and 0 where not; 1 / the share that does."""
    drop = min(round(probability * LEVELS), LEVELS - 1)
    if like.device.type != "cpu":
        stays = torch.rand_like(like, dtype=torch.float32) >= drop / LEVELS
        return stays.view(torch.int8), LEVELS / (LEVELS - drop)
    count = like.numel()
    bits = torch.empty(-(-count // 4) or 1, dtype=torch.int64).random_(-(2**63), None)
    mask = bits.view(torch.int16)[:count].view(like.shape).ge_(drop - LEVELS // 2)  # int16 runs from -2^15
    return mask.to(torch.int8), LEVELS / (LEVELS - drop)


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x with zeros where the mask has them; x itself without a mask."""
    return x if keep is None else keep.to(x.dtype).mul_(x)
