"""Which implementation computes adapted layers in training: the fused autograd functions, or plain PyTorch beside them.

`LORAKIT_KERNELS=reference` in the environment takes the plain path everywhere; the tests hold the two equal.
"""

import os

import torch
from torch import Tensor

from lorakit.errors import UsageError

NAMES = ("fused", "reference")


def asked() -> str:
    """The value of LORAKIT_KERNELS. Raises UsageError on one that is unknown."""
    name = os.environ.get("LORAKIT_KERNELS", "fused")
    if name not in NAMES:
        raise UsageError(f"LORAKIT_KERNELS={name!r}: expected one of {', '.join(NAMES)}.")
    return name


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x's device; the meta device has none, and asking there is an error."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


fused = asked() == "fused"  # read through the module, so that a test can turn it
