"""Where a run computes, and the memory that it takes."""

import resource
import sys

import torch
from torch import nn

from lorakit.attach.quantized import stored_bytes


def best_device() -> str | None:
    """The accelerator of this machine ("cuda", "mps"), as accelerate chooses it; None = the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def model_bytes(model: nn.Module) -> int:
    """Bytes of the base's parameters, shared ones once, quantised ones with their scales."""
    return sum(stored_bytes(p) for name, p in model.named_parameters() if ".lora_" not in f".{name}")


def peak_memory() -> int:
    """The most memory that this process has held, in bytes: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
