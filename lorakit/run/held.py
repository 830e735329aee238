"""How much memory this process holds, and the most that it held since a moment: what a training takes above its model."""

import ctypes
import gc
import importlib
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from lorakit.core.gemm import product
from lorakit.errors import TrainingError
from lorakit.run.device import peak_memory


def wake(device: torch.device) -> None:
    """Import and start what every training needs once: code is no part of what training holds."""
    importlib.import_module("accelerate")
    layer = nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(64, 64, device=device)).sum().backward()
    optimizer.step()
    product(torch.ones(64, 512, device=device), torch.ones(512, 512, device=device))  # large enough for oneDNN


def touch(model: nn.Module) -> None:
    """Read every weight once: files that are mapped into memory count as held only from then on."""
    for parameter in model.parameters():
        parameter.detach().sum()


def count_from_here(device: torch.device) -> int:
    """Bytes held now; `most_held` tells the peak since. Of the GPU's memory where `device` is one, else resident."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    if not sys.platform.startswith("linux"):
        return peak_memory()
    with suppress(OSError, AttributeError):  # a C library without malloc_trim: what loading freed counts as held
        ctypes.CDLL(None).malloc_trim(0)
    # Linux counts the peak anew after this. (getrusage's peak starts at that of the process that began this one.)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def most_held(device: torch.device) -> int:
    """The most bytes held since `count_from_here`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM") if sys.platform.startswith("linux") else peak_memory()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise TrainingError(f"/proc/self/status does not tell {key}, so memory cannot be measured. Leave it out.")
