"""loralib's layers whose tensors are not PEFT's: MergedLinear and Conv2d, each with its exact inverse."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Conv(NamedTuple):
    """A pair of a convolution. times: PEFT's rank over loralib's r, so that alpha grows with it. form: dense or blocks."""

    a: Tensor
    b: Tensor
    times: int
    form: str


def from_merged(b: Tensor, enabled: Sequence[bool]) -> Tensor:
    """B (out, r * n) of an ordinary pair, from MergedLinear's B (out / len(enabled) * n, r) for n enabled parts.

    Rows of part p take columns i*r..(i+1)*r, where p is the i-th enabled part; every other block is zero. A stays.
    """
    count, r = sum(enabled), b.shape[1]
    part = b.shape[0] // count
    whole = b.new_zeros(len(enabled), part, count, r)
    for i, p in enumerate(_where(enabled)):
        whole[p, :, i] = b[i * part : (i + 1) * part]
    return whole.reshape(len(enabled) * part, count * r)


def to_merged(b: Tensor, enabled: Sequence[bool]) -> Tensor | None:
    """The inverse of `from_merged`, None where B (out, r * n) has not its blocks."""
    count = sum(enabled)
    if not count or b.shape[0] % len(enabled) or b.shape[1] % count:
        return None
    blocks = b.reshape(len(enabled), b.shape[0] // len(enabled), count, b.shape[1] // count)
    own = torch.cat([blocks[p, :, i] for i, p in enumerate(_where(enabled))])
    return own.contiguous() if int(torch.count_nonzero(b)) == int(torch.count_nonzero(own)) else None


def _where(enabled: Sequence[bool]) -> list[int]:
    return [p for p, one in enumerate(enabled) if one]


def from_conv(a: Tensor, b: Tensor, module: nn.Module) -> Conv | str:
    """PEFT's pair for loralib's Conv2d, A (r*k, in*k), B (out*k, r*k), whose update is (B A).view(out, in, k, k).

    Row o*k + p of B A is the p-th of k slices of filter o. So filter o is a sum over p of B[o*k + p] times a slice of A
    alone: a pair of rank r*k*k with A set in blocks. Where B is the same for every slice, rank r does.
    """
    if not isinstance(module, nn.Conv2d) or len(set(module.kernel_size)) > 1:
        return "loralib has square two-dimensional convolutions only"
    if module.groups > 1:
        return f"a convolution in {module.groups} groups: loralib's update crosses them, and PEFT's form cannot hold it"
    k, d_in, d_out = module.kernel_size[0], module.in_channels, module.out_channels
    if a.shape[1] != d_in * k or b.shape[0] != d_out * k or a.shape[0] % k or b.shape[1] != a.shape[0]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a convolution {d_in} -> {d_out} of kernel {k}"
    r = a.shape[0] // k
    slices = b.reshape(d_out, k, r, k)
    core = slices[:, 0, :, 0]
    same = torch.einsum("or,pq->oprq", core, torch.eye(k, dtype=b.dtype))
    if torch.equal(slices, same):
        return Conv(a.reshape(r, d_in, k, k), core.reshape(d_out, r, 1, 1).clone(), 1, "dense")
    blocks = a.new_zeros(k, r * k, k, d_in * k)
    for p in range(k):
        blocks[p, :, p] = a
    return Conv(blocks.reshape(k * r * k, d_in, k, k), b.reshape(d_out, k * r * k, 1, 1), k * k, "blocks")


def to_conv(a: Tensor, b: Tensor, form: str | None) -> Conv | str:
    """loralib's Conv2d for PEFT's A (R, in, k, k), B (out, R, 1, 1): always possible, with r = R; `form` blocks undoes
    `from_conv`'s."""
    if a.dim() != 4 or a.shape[2] != a.shape[3]:
        return "loralib has square two-dimensional convolutions only"
    if b.shape[1] != a.shape[0]:
        return "a convolution in groups, which loralib's form cannot hold"
    rank, d_in, k, d_out = a.shape[0], a.shape[1], a.shape[2], b.shape[0]
    if form == "blocks":
        blocks = a.reshape(k, rank // k, k, d_in * k)
        own = blocks[0, :, 0]
        if rank % (k * k) or any(not _is_block(blocks[p], p, own) for p in range(k)):
            return "its lora_A has no longer the blocks of loralib's convolution"
        return Conv(own.clone(), b.reshape(d_out * k, rank // k), k * k, "blocks")
    eye = torch.eye(k, dtype=b.dtype)
    spread = torch.einsum("or,pq->oprq", b.reshape(d_out, rank), eye).reshape(d_out * k, rank * k)
    return Conv(a.reshape(rank * k, d_in * k), spread, 1, "dense")


def _is_block(block: Tensor, p: int, own: Tensor) -> bool:
    """Whether a (rows, k, columns) block holds `own` in slice p and zeros elsewhere."""
    return torch.equal(block[:, p], own) and int(torch.count_nonzero(block)) == int(torch.count_nonzero(own))
