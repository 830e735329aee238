"""The most memory that training with a method holds above the loaded base, in a process of its own: what other runs freed
before would otherwise be taken again unseen.
"""

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import torch

from lorakit.compare.child import Child
from lorakit.compare.shared import Base
from lorakit.errors import TrainingError
from lorakit.run.held import count_from_here, most_held, touch, wake
from lorakit.run.listen import Listener
from lorakit.run.recipe import Recipe

STEPS = 3
"""With the third, the optimizer's state and every buffer that is kept are there."""
SEEN = 200
"""Batches of the first epoch among which the heaviest is looked for."""


def peak_of(recipe: Recipe, quality: str) -> int:
    """Bytes above the loaded base at the peak of a few training steps on a large batch. Raises TrainingError, LorakitError."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, recipe, quality, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "the process that measured its memory ended by itself: out of memory, most likely."
            ) from error


def _measure(recipe: Recipe, quality: str, threads: int) -> int:
    torch.set_num_threads(threads)
    child = Child(recipe, Base(), None, quality, Listener())
    child.read_data()
    device = child.open().model.device
    wake(device)
    touch(child.model)
    child.folder.path.mkdir(parents=True, exist_ok=True)  # kept states may go to a file in it
    before = count_from_here(device)
    child.dress()
    child.encode()
    trainer = child.trainer()
    trainer.hooks.row = _unheard
    batch = max(islice(trainer.batches.make(0, 0), SEEN), key=_positions)
    trainer.model.train()
    for _ in range(STEPS):
        trainer.step([batch])
    return max(0, most_held(device) - before)


def _unheard(row: Any) -> None:
    """No row of these steps is kept."""


def _positions(batch: Mapping[str, Any]) -> int:
    return max((tensor.numel() for key, tensor in batch.items() if key in ("input_ids", "pixel_values")), default=0)
