"""Which implementation computes adapted layers in training: the fused autograd functions, or plain PyTorch beside them.

`LORAKIT_KERNELS=reference` in the environment takes the plain path everywhere; the tests hold the two equal.
"""

import os

NAMES = ("fused", "reference")


def asked() -> str:
    """The value of LORAKIT_KERNELS. Raises ValueError on one that is unknown."""
    name = os.environ.get("LORAKIT_KERNELS", "fused")
    if name not in NAMES:
        raise ValueError(f"LORAKIT_KERNELS={name!r}: expected one of {', '.join(NAMES)}.")
    return name


fused = asked() == "fused"  # read through the module, so that a test can turn it
