"""What a data set amounts to once encoded, for a report."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.data.batch import BatchOrder
from lorakit.data.encode import IGNORE, Encoded
from lorakit.data.examples import Dataset, QuestionExample
from lorakit.errors import UsageError


@dataclass(frozen=True)
class DataSummary:
    """Counts of a data set. Tokens are those of `input_ids` (of seq2seq also the targets' in `loss_tokens`).

    rows: encoded rows; a question on a long context is several. loss_tokens: tokens that carry loss; rows for
    classification and questions. longest: tokens of the longest row. padding_share:
    the part of all positions, 0 to 1, that is padding at `batch_size` in the order of the first epoch.
    """

    source: str
    format: str
    rows: int
    tokens: int
    loss_tokens: int
    longest: int
    batch_size: int
    padding_share: float
    label_names: list[str] | None


def describe(dataset: Dataset, encoded: Sequence[Encoded], *, batch_size: int = 8, seed: int = 0) -> DataSummary:
    """Counts `encoded`, the rows of `dataset`. Raises UsageError where there are none, or not as many as examples."""
    windows = bool(dataset.examples) and isinstance(dataset.examples[0], QuestionExample)
    if not encoded or (len(encoded) < len(dataset) if windows else len(encoded) != len(dataset)):
        raise UsageError(f"Expected the {len(dataset)} encoded rows of {dataset.source}, came {len(encoded)}")
    lengths = [len(row.input_ids) for row in encoded]
    order = BatchOrder(lengths, batch_size, seed)
    positions = sum(len(batch) * max(lengths[row] for row in batch) for batch in order.epoch(0))
    return DataSummary(
        source=dataset.source,
        format=dataset.format,
        rows=len(encoded),
        tokens=sum(lengths),
        loss_tokens=len(encoded) if windows else sum(_with_loss(row) for row in encoded),
        longest=max(lengths),
        batch_size=batch_size,
        padding_share=1 - sum(lengths) / positions if positions else 0.0,
        label_names=dataset.label_names,
    )


def _with_loss(row: Encoded) -> int:
    return sum(label != IGNORE for label in row.labels) if isinstance(row.labels, list) else 1
