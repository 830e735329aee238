"""The processes that train one adapter together: each runs its share of every step's examples on a copy of the model.

Counts of targets and gradients are summed over all of them, so the step is that of one process on the same examples.
Started by `torchrun` or `accelerate launch`; a single process is a world of its own, in which nothing is sent.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: the first alone measures the base and answers the whole eval set."""


@dataclass(frozen=True)
class World:
    """rank: this process's number, from 0; size: how many there are; device: of the tensors that are sent."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def share(self, rows: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a step's rows; sorted by length, every process gets rows of all lengths."""
        return rows[self.rank :: self.size]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return value if self.size == 1 else self.sums([float(value)])[0] > 0

    def add_gradients(self, held: Sequence[nn.Parameter]) -> None:
        """Sum each tensor's gradient over all processes, in place; one that a process lacks counts as zero."""
        if self.size == 1:
            return
        for one in held:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
            torch.distributed.all_reduce(one.grad)

    def same_values(self, held: Sequence[nn.Parameter]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for one in held:
                torch.distributed.broadcast(one.data, 0)

    def same(self, value: Any) -> Any:
        """The first process's value, a plain object, in all."""
        if self.size == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, 0, device=torch.device(self.device))
        return held[0]

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, of one shape, by rank."""
        if self.size == 1:
            return [tensor]
        sent = tensor.to(self.device)
        found = [torch.empty_like(sent) for _ in range(self.size)]
        torch.distributed.all_gather(found, sent)
        return [one.cpu() for one in found]

    def wait(self) -> None:
        """Until all processes have come here."""
        self.sums([0.0])


def join() -> World:
    """The world that this process was started in (WORLD_SIZE in the environment), or the one that is joined already."""
    distributed = torch.distributed
    if not distributed.is_available():
        return World()
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return World()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(distributed.destroy_process_group)
    device = "cpu" if "gloo" in str(distributed.get_backend()) or not torch.cuda.is_available() else "cuda"
    return World(distributed.get_rank(), distributed.get_world_size(), device)
