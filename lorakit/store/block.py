"""Copies of many tensors in one piece of memory: a thousand adapters then take what their files take.

Allocated one by one between others that go again, they leave holes that no later tensor fits, half as much again as a file.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64  # bytes: where a tensor begins, as torch's own allocator has it
KNOWN = (torch.float32, torch.float16, torch.float64)  # to numpy too
SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies without gradients, all of one device and type in one piece of memory."""
    copies: list[Tensor] = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for k, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(k)
    for (device, dtype), members in groups.items():
        step = ALIGNED // dtype.itemsize
        sizes = [-(-tensors[k].numel() // step) * step for k in members]
        block = torch.empty(sum(sizes), dtype=dtype, device=device)
        for k, start in zip(members, accumulate(sizes, initial=0), strict=False):
            source = tensors[k].detach()
            # .data: autograd counts the changes of each alone
            copies[k] = block[start : start + source.numel()].view(source.shape).data
            _fill(copies[k], source)
    return copies


def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies without gradients, each in memory of its own."""
    return [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _fill(place: Tensor, source: Tensor) -> None:
    """`place.copy_(source)`. numpy turns a matrix of a few columns round in a third of the time."""
    if source.dim() == 2 and not source.is_contiguous() and source.device.type == "cpu":
        if source.dtype not in KNOWN:
            alike = SAME_WIDTH[source.element_size()]
            place, source = place.view(alike), source.view(alike)
        np.copyto(place.numpy(), source.numpy())
    else:
        place.copy_(source)
