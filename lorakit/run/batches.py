"""Encoded rows as the training loop takes them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lorakit.data import BatchOrder, Encoded, collate


class EncodedBatches:
    """The batches of a data set; the same for the same seed and epoch. pad_id: the tokenizer's padding token."""

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
        self.rows, self.task, self.pad_id = rows, task, pad_id
        self.order = BatchOrder([len(row.input_ids) for row in rows], batch_size, seed, group_by_length)

    def __len__(self) -> int:
        return len(self.order)

    def make(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from number `start` on."""
        return (self._batch(rows) for rows in self.order.epoch(epoch)[start:])

    def evaluation(self) -> list[dict[str, Tensor]]:
        """All rows once, for measuring."""
        return [self._batch(rows) for rows in self.order.evaluation()]

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return collate([self.rows[number] for number in numbers], pad_id=self.pad_id, task=self.task)
