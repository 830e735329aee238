"""A data set as the training loop takes it: encoded rows, and batches of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lorakit.attach.alone import taken
from lorakit.data import (
    BatchOrder,
    Dataset,
    Encoded,
    ImageExample,
    collate,
    collate_images,
    describe,
    encode_all,
)
from lorakit.data.batch import TokenOrder, split_batch
from lorakit.data.pack import PACK_LENGTH, collate_packed, pack_rows
from lorakit.errors import RecipeError, UsageError
from lorakit.models import Loaded
from lorakit.models.limits import longest_row
from lorakit.run.recipe import IMAGE_CLASSIFICATION, Recipe
from lorakit.train.config import TrainConfig
from lorakit.train.loss import Batch, Objective
from lorakit.train.packed import packed_objective, packing_for
from lorakit.train.world import World


class OrderedBatches(ABC):
    """The batches of a data set; the same for the same seed and epoch. A subclass makes a batch from row numbers.

    world: of several processes that train together each makes its share of every batch, {} where it has no row of it.
    """

    def __init__(self, order: BatchOrder | TokenOrder) -> None:
        self.order, self.world = order, World()

    def __len__(self) -> int:
        return len(self.order)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from number `start` on."""
        return (
            self._trained(own) if (own := self.world.share(rows)) else {} for rows in self.order.epoch(epoch)[start:]
        )

    def evaluation(self) -> Iterator[dict[str, Tensor]]:
        """All rows once, for measuring."""
        return (self._batch(rows) for rows in self.order.evaluation())

    def _trained(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch as it is trained on."""
        return self._batch(numbers)

    @abstractmethod
    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]: ...


class EncodedBatches(OrderedBatches):
    """Batches of token ids. pad_id: the tokenizer's padding token.

    batch_tokens: in place of batch_size, the most tokens of a batch. pack_length: of a packed row in the batches of an
    epoch, where packing saves padding; None = every example has a row to itself, as it always has for measuring.
    pass_tokens: the most positions of a batch for measuring, which holds rows of like length, as many as no batch in
    training could outgrow; None = that alone bounds it.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        *,
        task: str,
        pad_id: int,
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
        batch_tokens: int | None = None,
        pack_length: int | None = None,
        pass_tokens: int | None = None,
    ) -> None:
        lengths = [_length(row, task) for row in rows]
        order = BatchOrder(lengths, batch_size, seed, group_by_length)
        super().__init__(order if batch_tokens is None else TokenOrder(lengths, batch_tokens, seed))
        self.rows, self.task, self.pad_id, self.pack_length = rows, task, pad_id, pack_length
        largest = batch_tokens or batch_size * max(lengths, default=1)
        self.measured = TokenOrder(lengths, min(largest, pass_tokens or largest), seed)

    def evaluation(self) -> Iterator[dict[str, Tensor]]:
        """See OrderedBatches.evaluation."""
        return (self._batch(rows) for rows in self.measured.evaluation())

    def padding(self, batches: int = 200) -> float:
        """Positions a real token, 1 where there is no padding, in the first batches of training as they will be made."""
        made = [[len(self.rows[row].input_ids) for row in rows] for rows in self.order.epoch(0)[:batches]]
        return sum(map(self._positions, made)) / max(1, sum(map(sum, made)))

    def _positions(self, lengths: Sequence[int]) -> int:
        rows = self._layout(lengths)
        return len(rows) * max(sum(lengths[number] for number in row) for row in rows)

    def _layout(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which of a batch's examples share a row."""
        return [[n] for n in range(len(lengths))] if self.pack_length is None else pack_rows(lengths, self.pack_length)

    def _trained(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        items = [self.rows[number] for number in numbers]
        rows = self._layout([len(item.input_ids) for item in items])
        if len(rows) == len(items):  # nothing to save
            return self._batch(numbers)
        return collate_packed(items, rows, pad_id=self.pad_id, task=self.task)

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return collate([self.rows[number] for number in numbers], pad_id=self.pad_id, task=self.task)


def _length(row: Encoded, task: str) -> int:
    """The tokens of a row that a batch's bound counts: of seq2seq the longer of source and target."""
    target = len(row.labels) if task == "seq2seq" and isinstance(row.labels, list) else 0
    return max(len(row.input_ids), target)


class ImageBatches(OrderedBatches):
    """Batches of images, read when they are asked for: a data set of them does not fit into memory.

    processor: the model's own. dtype: of the pixels, the model's.
    """

    def __init__(
        self, rows: Sequence[ImageExample], *, processor: Any, dtype: torch.dtype, batch_size: int, seed: int
    ) -> None:
        super().__init__(BatchOrder([1] * len(rows), batch_size, seed, group_by_length=False))
        self.rows, self.processor, self.dtype = rows, processor, dtype

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = collate_images([self.rows[number] for number in numbers], self.processor)
        return {**batch, "pixel_values": batch["pixel_values"].to(self.dtype)}


def encode_rows(
    recipe: Recipe, loaded: Loaded, dataset: Dataset, *, progress: Callable[[int, int], None] | None = None
) -> list[Any]:
    """The rows of a data set for the recipe's task; of images the examples themselves, read when their batch is made."""
    if recipe.task == IMAGE_CLASSIFICATION:
        return list(dataset.examples)
    return encode_all(
        dataset,
        loaded.tokenizer,
        task=recipe.task,
        max_length=longest(recipe, loaded),
        truncate=recipe.data.truncate,
        progress=progress,
    )


def longest(recipe: Recipe, loaded: Loaded) -> int | None:
    """The most tokens of a row: what the recipe says, else what the model takes; None for images.

    Where a prefix or prompt takes positions, never more than are left: too long a row is told before training.
    """
    if recipe.task == IMAGE_CLASSIFICATION:
        return None
    said, limit = recipe.data.max_length, longest_row(loaded.model, loaded.tokenizer)
    return min(said, limit) if said and limit is not None and taken(loaded.model) else said or limit


def batches_of(recipe: Recipe, loaded: Loaded, rows: Sequence[Any]) -> OrderedBatches:
    """The batches of rows that `encode_rows` made, in the order that the recipe's seed gives."""
    size, seed = recipe.train.batch_size, recipe.train.seed
    if recipe.task == IMAGE_CLASSIFICATION:
        return ImageBatches(rows, processor=loaded.tokenizer, dtype=loaded.model.dtype, batch_size=size, seed=seed)
    return EncodedBatches(
        rows,
        task=recipe.task,
        pad_id=loaded.tokenizer.pad_token_id,
        batch_size=size,
        seed=seed,
        group_by_length=recipe.train.group_by_length is not False,
        batch_tokens=recipe.train.batch_tokens,
        pass_tokens=recipe.train.pass_tokens,
    )


def parts_of(recipe: Recipe, *, own_loss: bool) -> Callable[[Batch], Sequence[Batch]]:
    """How a batch is cut into forward passes: by train.pass_tokens; a loss of one's own is given all of its rows at once."""
    most = recipe.train.pass_tokens
    if own_loss or most is None:
        return lambda batch: (batch,)
    return lambda batch: split_batch(batch, most, recipe.task)


def packed(
    recipe: Recipe, loaded: Loaded, batches: Any, objective: Objective, *, own_loss: bool, note: Callable[[str], None]
) -> Objective:
    """Have `batches` pack its rows where the recipe wants it and the model takes it; returns the objective for them.

    A loss of one's own is given rows as it knows them, one example each. Raises RecipeError for `packing: true` where it
    cannot be, and for settings that would do nothing.
    """
    train = recipe.train
    if not isinstance(batches, EncodedBatches) and (train.batch_tokens or train.pack_length or train.packing is True):
        raise RecipeError(
            f"train.batch_tokens, packing and pack_length are of rows of tokens, and {recipe.task} has none. Leave them out."
        )
    if not train.packing or not isinstance(batches, EncodedBatches):
        return objective
    try:
        if own_loss:
            raise UsageError("a loss of one's own is given one example a row.")
        packing = packing_for(loaded.model, recipe.task, pad_id=batches.pad_id)
    except UsageError as error:
        if train.packing is True or train.pack_length is not None:
            raise RecipeError(f"train.packing is wanted, but {error} Leave it and train.pack_length out.") from error
        note(f"rows are not packed: {error}")
        return objective
    _draw_at_random(train, batches)
    padded, batches.pack_length = batches.padding(), _pack_length(train.pack_length, loaded)
    gained = batches.padding()
    if f"{gained:.2f}" != f"{padded:.2f}":
        note(f"rows are packed: {padded:.2f} -> {gained:.2f} positions a token")
    return packed_objective(objective, packing)


def as_if_packed(recipe: Recipe, loaded: Loaded, batches: Any) -> None:
    """Give `batches` the order that `packed` would, where rows cannot be packed themselves: with those of other adapters."""
    if not recipe.train.packing or not isinstance(batches, EncodedBatches):
        return
    with suppress(UsageError):
        packing_for(loaded.model, recipe.task, pad_id=batches.pad_id)
        _draw_at_random(recipe.train, batches)


def _draw_at_random(train: TrainConfig, batches: EncodedBatches) -> None:
    if train.group_by_length is None and isinstance(batches.order, BatchOrder):
        batches.order.group_by_length = False


def _pack_length(wanted: int | None, loaded: Loaded) -> int:
    """Positions restart in a packed row, but some models have buffers of their longest row's size."""
    limit = longest_row(loaded.model, loaded.tokenizer)
    if wanted is not None and limit is not None and wanted > limit:
        raise RecipeError(
            f"train.pack_length is {wanted}, but the model takes rows of at most {limit} tokens. Lower it."
        )
    return wanted or min(PACK_LENGTH, limit or PACK_LENGTH)


def told(recipe: Recipe, dataset: Dataset, rows: Sequence[Any]) -> str:
    """What a run says of its training set."""
    if recipe.task == IMAGE_CLASSIFICATION:
        return f"{len(rows):,} images of {len(dataset.label_names or []):,} classes"
    facts = describe(dataset, rows, batch_size=recipe.train.batch_size, seed=recipe.train.seed)
    broken = f" ({dataset.skipped:,} broken rows left out)" if dataset.skipped else ""
    return f"{facts.rows:,} rows, {facts.tokens:,} tokens, {facts.loss_tokens:,} of them targets{broken}"
