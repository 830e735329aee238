"""The most memory that one side holds above the loaded model, measured in a process of its own: what others freed before
would otherwise be taken again unseen.
"""

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from lorakit.bench.config import PEFT, ROWS, BenchConfig
from lorakit.bench.material import read, work_of
from lorakit.bench.sides import side_of
from lorakit.errors import TrainingError
from lorakit.models.quiet import quiet
from lorakit.run.held import count_from_here, most_held, touch, wake

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
    if side == PEFT:
        with quiet(progress=False):
            importlib.import_module("peft")
    wake(material.loaded.model.device)
    touch(material.loaded.model)
    before = count_from_here(material.loaded.model.device)
    trained = side_of(side, work)
    numbers = work.heaviest()
    for _ in range(STEPS):
        trained.round(numbers)
    return max(0, most_held(material.loaded.model.device) - before)
