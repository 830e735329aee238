"""The most memory that one side holds above the loaded model, measured in a process of its own: what others freed before
would otherwise be taken again unseen.
"""

import ctypes
import gc
import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from lorakit.bench.config import PEFT, ROWS, BenchConfig
from lorakit.bench.material import read, work_of
from lorakit.bench.sides import side_of
from lorakit.errors import TrainingError
from lorakit.models.quiet import quiet
from lorakit.run.device import peak_memory

STEPS = 3
"""Rounds that are run: with the third, the optimizer's state and every buffer that is kept are there."""


def peak_above_model(config: BenchConfig, row: str, side: str) -> int:
    """Bytes that `side` holds at its peak over the loaded base, in a fresh process. Raises TrainingError where that dies."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, config, row, side, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise TrainingError(
                f"the process that measured the memory of {side} (row {row!r}) ended by itself: out of memory, most likely. "
                "Take a smaller batch or length, or leave memory out (--no-memory)."
            ) from error


def _measure(config: BenchConfig, row: str, side: str, threads: int) -> int:
    torch.set_num_threads(threads)
    material = read(config, alone=True)
    work = work_of(ROWS[row], material)
    _wake(material.loaded.model.device, with_peft=side == PEFT)
    _touch(material.loaded.model)
    before = _start(material.loaded.model.device)
    trained = side_of(side, work)
    numbers = work.heaviest()
    for _ in range(STEPS):
        trained.round(numbers)
    return max(0, _peak(material.loaded.model.device) - before)


def _wake(device: torch.device, *, with_peft: bool) -> None:
    """Import and start what every training needs once: code is no part of what training holds."""
    importlib.import_module("accelerate")
    if with_peft:
        with quiet(progress=False):
            importlib.import_module("peft")
    layer = nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(64, 64, device=device)).sum().backward()
    optimizer.step()


def _touch(model: nn.Module) -> None:
    """Read every weight once: files that are mapped into memory count as held only from then on."""
    for parameter in model.parameters():
        parameter.detach().sum()


def _start(device: torch.device) -> int:
    """Bytes held now; the peak is counted from here."""
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


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM") if sys.platform.startswith("linux") else peak_memory()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise TrainingError(
        f"/proc/self/status does not tell {key}, so memory cannot be measured. Leave it out (--no-memory)."
    )
