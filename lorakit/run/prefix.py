"""Whether a run keeps the states below its first adapted block (lorakit.train.prefix_cache), and its batches if so."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.data import collate
from lorakit.data.batch import ROWS
from lorakit.data.pack import SEGMENTS, pack_rows
from lorakit.errors import RecipeError, UsageError
from lorakit.run.batches import EncodedBatches
from lorakit.run.folder import RunFolder
from lorakit.run.recipe import CLASSIFICATION, Recipe
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Batches, total_steps
from lorakit.train.loss import Objective
from lorakit.train.prefix import find_prefix, lowest_block_trained
from lorakit.train.prefix_cache import PrefixCache, cached_objective, check_exact
from lorakit.train.prefix_store import GIB, StateStore
from lorakit.train.world import World

TASKS = ("causal-lm", CLASSIFICATION)


def prefixed(
    recipe: Recipe,
    model: Any,
    batches: Any,
    objective: Objective,
    *,
    own_loss: bool,
    note: Callable[[str], None],
    world: World | None = None,
) -> tuple[Batches, Objective]:
    """Batches and objective that run the blocks below the first adapted one once for each row, where that is exact.

    They come back as they were where it is not, where the settings say no, and (for "auto") where no row is seen twice.
    States that memory does not take go to the run's folder. Raises RecipeError for `prefix_cache: true` where it cannot be.
    """
    settings = recipe.train
    forced, epoch = settings.prefix_cache is True, math.ceil(len(batches) / settings.accumulate)
    once = total_steps(settings, len(batches)) <= epoch  # no row is seen twice
    if settings.prefix_cache is False or (not forced and (once or lowest_block_trained(model))):
        return batches, objective
    try:
        if world is not None and world.size > 1:
            raise UsageError("several processes train together, and states are kept in one process only.")
        if own_loss or not isinstance(batches, EncodedBatches) or batches.task not in TASKS:
            raise UsageError(
                f"it is for the losses of {' and '.join(TASKS)}; a loss of one's own may run the model as it likes."
            )
        cache = _cache(settings, model, batches, RunFolder(recipe.output).path)
    except UsageError as error:
        if forced:
            raise RecipeError(f"train.prefix_cache is wanted, but {error}") from error
        note(f"the lower blocks' states are not kept: {error}")
        return batches, objective
    prefix, size = cache.prefix, cache.store.total / GIB
    note(f"{prefix.depth} of {len(prefix.blocks)} blocks are run once for each row; their states take {size:.2f} GiB")
    return NumberedBatches(batches), cached_objective(objective, cache)


class NumberedBatches:
    """Batches that say which rows they hold (ROWS), in the order of their tokens, packed or not."""

    def __init__(self, batches: EncodedBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """See OrderedBatches.make."""
        made, orders = self.batches.make(epoch, start), self.batches.order.epoch(epoch)[start:]
        for batch, numbers in zip(made, orders, strict=True):
            yield {**batch, ROWS: torch.tensor(self._as_packed(numbers) if SEGMENTS in batch else numbers)}

    def _as_packed(self, numbers: list[int]) -> list[int]:
        lengths = [self.batches.order.lengths[number] for number in numbers]
        rows = pack_rows(lengths, self.batches.pack_length or 0)
        return [numbers[place] for row in rows for place in row]


def _cache(settings: TrainConfig, model: Any, batches: EncodedBatches, folder: Path) -> PrefixCache:
    """The cache, tried out on the two rows of the smallest and the median length. Raises UsageError."""
    lengths = batches.order.lengths

    def batch_of(numbers: Any) -> dict[str, Tensor]:
        return collate([batches.rows[number] for number in numbers], pad_id=batches.pad_id, task=batches.task)

    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    trial = sorted({ordered[0], ordered[len(ordered) // 2]})
    inputs = {key: value.to(model.device) for key, value in batch_of(trial).items() if key != "labels"}
    with _as_trained(model, settings):
        prefix = find_prefix(model, inputs)
        memory, disk = int(settings.prefix_memory * GIB), int(settings.prefix_disk * GIB)
        store = StateStore(lengths, prefix.width, prefix.dtype, memory=memory, disk=disk, folder=folder)
        cache = PrefixCache(prefix, lengths, batch_of, store)
        few = [lengths[number] for number in trial]
        apart = StateStore(few, prefix.width, prefix.dtype, memory=sum(few) * store.token_bytes, disk=0, folder=folder)
        known = PrefixCache(prefix, few, lambda places: batch_of([trial[place] for place in places]), apart)
        check_exact(model, known, range(len(trial)))
    return cache


@contextmanager
def _as_trained(model: Any, settings: TrainConfig) -> Iterator[None]:
    """Evaluation mode, under the autocast of the training."""
    half, mode = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision), model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, half, enabled=half is not None):
            yield
    finally:
        model.train(mode)
