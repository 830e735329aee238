"""GPUs by what fits on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MiB = 2**20
CONTEXT = 600 * MiB
"""What a CUDA context, its libraries and their workspaces take of a GPU before the first tensor."""
FRAGMENTS = 0.05
"""The share of the rest that an allocator loses between blocks. CONTEXT and this are assumptions, not measurements."""


@dataclass(frozen=True)
class GPU:
    """memory: bytes, as its driver reports them; bfloat16: whether it multiplies in bfloat16."""

    name: str
    memory: int
    bfloat16: bool = True

    @property
    def usable(self) -> int:
        """Bytes left for tensors."""
        return int((self.memory - CONTEXT) * (1 - FRAGMENTS))


GPUS: tuple[GPU, ...] = (
    GPU("RTX 3080 10 GB", 10240 * MiB),
    GPU("RTX 2080 Ti 11 GB", 11264 * MiB, bfloat16=False),
    GPU("T4 16 GB", 15360 * MiB, bfloat16=False),
    GPU("V100 16 GB", 16384 * MiB, bfloat16=False),
    GPU("A10 24 GB", 23028 * MiB),
    GPU("L4 24 GB", 23034 * MiB),
    GPU("RTX 3090 24 GB", 24576 * MiB),
    GPU("V100 32 GB", 32768 * MiB, bfloat16=False),
    GPU("A100 40 GB", 40960 * MiB),
    GPU("L40S 48 GB", 46068 * MiB),
    GPU("H100 80 GB", 81559 * MiB),
    GPU("A100 80 GB", 81920 * MiB),
    GPU("H200 141 GB", 143771 * MiB),
)
"""By memory, the smallest first."""


@dataclass(frozen=True)
class Fit:
    """What holds a run: `count` GPUs of one kind, with weights, state and batch split evenly between them."""

    gpu: str
    count: int

    def __str__(self) -> str:
        return self.gpu if self.count == 1 else f"{self.count} x {self.gpu}"


def smallest(peak: int, *, bfloat16: bool, gpus: Sequence[GPU] = GPUS) -> Fit:
    """The smallest GPU whose usable memory holds `peak` bytes, else how many of the largest do.

    bfloat16: only GPUs that multiply in it. What GPUs keep to talk to each other is not counted.
    """
    able = sorted((gpu for gpu in gpus if gpu.bfloat16 or not bfloat16), key=lambda one: one.memory)
    fitting = next((gpu for gpu in able if peak <= gpu.usable), None)
    return Fit(fitting.name, 1) if fitting else Fit(able[-1].name, math.ceil(peak / able[-1].usable))
