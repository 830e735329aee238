"""A data set as the training loop takes it: encoded rows, and batches of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

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
from lorakit.models import Loaded
from lorakit.models.limits import longest_row
from lorakit.run.recipe import IMAGE_CLASSIFICATION, Recipe


class OrderedBatches(ABC):
    """The batches of a data set; the same for the same seed and epoch. A subclass makes a batch from row numbers."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from number `start` on."""
        return (self._batch(rows) for rows in self.order.epoch(epoch)[start:])

    def evaluation(self) -> Iterator[dict[str, Tensor]]:
        """All rows once, for measuring."""
        return (self._batch(rows) for rows in self.order.evaluation())

    @abstractmethod
    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]: ...


class EncodedBatches(OrderedBatches):
    """Batches of token ids. pad_id: the tokenizer's padding token."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        *,
        task: str,
        pad_id: int,
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
    ) -> None:
        super().__init__(BatchOrder([len(row.input_ids) for row in rows], batch_size, seed, group_by_length))
        self.rows, self.task, self.pad_id = rows, task, pad_id

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return collate([self.rows[number] for number in numbers], pad_id=self.pad_id, task=self.task)


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
    """The most tokens of a row: what the recipe says, else what the model takes; None for images."""
    if recipe.task == IMAGE_CLASSIFICATION:
        return None
    return recipe.data.max_length or longest_row(loaded.model, loaded.tokenizer)


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
        group_by_length=recipe.train.group_by_length,
    )


def told(recipe: Recipe, dataset: Dataset, rows: Sequence[Any]) -> str:
    """What a run says of its training set."""
    if recipe.task == IMAGE_CLASSIFICATION:
        return f"{len(rows):,} images of {len(dataset.label_names or []):,} classes"
    facts = describe(dataset, rows, batch_size=recipe.train.batch_size, seed=recipe.train.seed)
    return f"{facts.rows:,} rows, {facts.tokens:,} tokens, {facts.loss_tokens:,} of them targets"
