"""The terms of a step's peak memory, in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.errors import UsageError
from lorakit.plan.trace import Traced

OPTIMIZERS = {"adamw": (2, 0), "adam8bit": (0, 2), "momentum": (1, 0), "sgd": (0, 0)}
"""Optimizer -> (copies of the trained parameters in their own type, further bytes for each number) that it keeps between
steps. adam8bit: Dettmers et al. 2022, arXiv 2110.02861, both moments in a byte each."""


@dataclass(frozen=True)
class Memory:
    """weights: of base and adapter. gradients, optimizer: of what is trained. activations: what the forward pass keeps for
    the backward pass. peak: the most at a time, which is less than the sum where gradients come as activations go, and more
    where one operation needs room of its own."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def check_optimizer(name: str) -> None:
    """Raise UsageError for an optimizer that is not planned for."""
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer {name!r} is unknown; expected one of: {', '.join(OPTIMIZERS)}.")


def state_bytes(trained: Sequence[Tensor], optimizer: str) -> int:
    """What the optimizer keeps between steps."""
    copies, further = OPTIMIZERS[optimizer]
    return copies * _bytes(trained) + further * sum(tensor.numel() for tensor in trained)


def memory_of(weights: int, trained: Sequence[Tensor], traced: Traced, *, optimizer: str, device: str) -> Memory:
    """The peak of a step after the first: the larger of forward-and-backward's and the optimizer's.

    Optimizer's step: gradients, and AdamW's denominators: of all parameters at once on a GPU (torch's foreach form), of one
    parameter at a time, twice, on a CPU.
    """
    gradients, state = _bytes(trained), state_bytes(trained, optimizer)
    room = 0
    if optimizer == "adamw":
        room = gradients if device == "cuda" else 2 * max((_bytes([tensor]) for tensor in trained), default=0)
    peak = weights + state + max(traced.first, traced.second, gradients + room)
    return Memory(weights, gradients, state, traced.saved, peak)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
