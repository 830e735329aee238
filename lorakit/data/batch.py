"""Rows -> batches: padding to the longest of the batch, and orders that put rows of like length together."""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.data.encode import CAUSAL_LM, CLASSIFICATION, IGNORE, QUESTION_ANSWERING, SEQ2SEQ, Encoded, check_task
from lorakit.errors import UsageError

MEGABATCH = 50
"""How many batches are sorted by length together: enough to be rid of most padding, few enough to stay shuffled."""


def collate(items: Sequence[Encoded], *, pad_id: int, task: str, side: str = "right") -> dict[str, Tensor]:
    """One batch, padded to its longest row.

    side: where the padding goes, right or left (the target of seq2seq is always padded right).
    Returns input_ids (batch, seq), attention_mask (batch, seq), token_type_ids (batch, seq) where the rows have them,
    and labels: (batch, seq) for causal-lm, (batch, target) for seq2seq, both -100 at padding; (batch,) for
    sequence-classification, of integers for classes, float32 for scores; (batch, 2) for question-answering, the first
    and the last token of the answer in the padded row. Raises UsageError.
    """
    check_task(task)
    if side not in ("left", "right"):
        raise UsageError(f"side must be left or right, came {side!r}")
    if not items:
        raise UsageError("A batch needs at least one row, came none.")
    rows = [item.input_ids for item in items]
    batch = {
        "input_ids": padded(rows, pad_id, side),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, side),
    }
    types = [item.token_type_ids for item in items if item.token_type_ids is not None]
    if len(types) == len(items):
        batch["token_type_ids"] = padded(types, 0, side)
    batch["labels"] = labels_of(items, task, side)
    return batch


def labels_of(items: Sequence[Encoded], task: str, side: str = "right") -> Tensor:
    """The labels of a batch, as `collate` says. Raises UsageError for rows of another task."""
    single = [item.labels for item in items if not isinstance(item.labels, list)]
    several = [item.labels for item in items if isinstance(item.labels, list)]
    if len(single if task == CLASSIFICATION else several) != len(items):
        raise UsageError(f"These rows were encoded for another task than {task}. Encode them for it.")
    if task == CLASSIFICATION:
        scores = any(isinstance(label, float) for label in single)
        return torch.tensor(single, dtype=torch.float32 if scores else torch.long)
    if task == QUESTION_ANSWERING:
        longest = max(len(item.input_ids) for item in items)
        shifts = [longest - len(item.input_ids) if side == "left" else 0 for item in items]
        return torch.tensor([[place + shift for place in span] for span, shift in zip(several, shifts, strict=True)])
    return padded(several, IGNORE, "right" if task == SEQ2SEQ else side)


def padded(rows: Sequence[list[int]], fill: int, side: str = "right", least: int = 0) -> Tensor:
    """(rows, longest): each row filled up to the longest, or to `least` where that is more."""
    longest = max(least, *map(len, rows))
    blanks = ([fill] * (longest - len(row)) for row in rows)
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in zip(rows, blanks, strict=True)])


ROWS = "row_numbers"
"""A key of batches that say which rows they hold: (rows,), or of a packed batch (examples,) in the order of their tokens."""
_KEYS = frozenset(("input_ids", "attention_mask", "token_type_ids", "labels", "segments", ROWS))
_SPLIT = (CAUSAL_LM, SEQ2SEQ, CLASSIFICATION, QUESTION_ANSWERING)
PASS = 512
"""Positions that a forward and backward pass must save to be worth its calls."""


def split_batch(batch: Mapping[str, Tensor], most: int, task: str) -> list[Mapping[str, Tensor]]:
    """The batches in which a batch of tokens, packed or not, is run: each of at most `most` positions, or of one row.

    Rows of like length come together, padded to the longest of theirs; there are as few batches as saving padding pays.
    Their losses' sums add up to the whole batch's. A batch of something else comes back as it is.
    """
    rows, length = batch["input_ids"].shape if "input_ids" in batch else (1, 1)
    if (
        rows == 1
        or task not in _SPLIT
        or not batch.keys() <= _KEYS
        or (("segments" in batch) == ("attention_mask" in batch))
    ):
        return [batch]
    if "segments" in batch:
        if task == QUESTION_ANSWERING:
            return [batch]
        step = rows if rows * length <= most else max(1, most // length)
        return [_some_packed(batch, begin, begin + step, task) for begin in range(0, rows, step)]
    mask = batch["attention_mask"]
    place = torch.arange(1, length + 1, device=mask.device)
    left = not bool(mask[:, 0].all())
    if left and task == QUESTION_ANSWERING:  # whose labels are places in the padded row
        return [batch]
    lengths = (mask * (place.flip(0) if left else place)).amax(1).clamp_min(1).tolist()
    sizes = lengths if task != SEQ2SEQ else [a + b for a, b in zip(lengths, _targets(batch), strict=True)]
    order = sorted(range(rows), key=sizes.__getitem__, reverse=True)
    cuts = _cuts([sizes[row] for row in order], most)
    if len(cuts) == 1:
        return [batch]
    groups = [order[begin:end] for begin, end in cuts]
    return [_some_rows(batch, group, max(lengths[row] for row in group), left, task) for group in groups]


def _targets(batch: Mapping[str, Tensor]) -> list[int]:
    """The length of each row's target."""
    labels = batch["labels"]
    place = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    found: list[int] = ((labels != IGNORE) * place).amax(1).tolist()
    return found


def _cuts(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(begin, end) of each batch of rows sorted by falling length: the cheapest, counting PASS positions a batch."""
    least, came = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        costs = [
            (least[begin] + (end - begin) * lengths[begin] + PASS, begin)
            for begin in range(end)
            if (end - begin) * lengths[begin] <= most or end - begin == 1
        ]
        cost, begin = min(costs)
        least.append(cost)
        came.append(begin)
    cuts, end = [], len(lengths)
    while end:
        cuts.append((came[end], end))
        end = came[end]
    return cuts[::-1]


def _some_rows(
    batch: Mapping[str, Tensor], rows: Sequence[int], length: int, left: bool, task: str
) -> dict[str, Tensor]:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[list(rows)][:, -length:] if left else tensor[list(rows)][:, :length]

    found = {key: cut(value) for key, value in batch.items() if key not in ("labels", ROWS)}
    if ROWS in batch:
        found[ROWS] = batch[ROWS][list(rows)]
    if "labels" in batch:
        labels = batch["labels"]
        if task == SEQ2SEQ:
            own = labels[list(rows)]
            found["labels"] = own[:, : max(1, *_targets({"labels": own}))]
        else:
            found["labels"] = labels[list(rows)] if task in (CLASSIFICATION, QUESTION_ANSWERING) else cut(labels)
    return found


def _some_packed(batch: Mapping[str, Tensor], begin: int, end: int, task: str) -> Mapping[str, Tensor]:
    """Rows of a packed batch; of what there is for each example, that of the rows' examples."""
    held = batch["segments"].amax(1)
    examples = slice(int(held[:begin].sum()), int(held[:end].sum()))
    single = {ROWS, "labels"} if task == CLASSIFICATION else {ROWS}
    return {key: value[examples if key in single else slice(begin, end)] for key, value in batch.items()}


class BatchOrder:
    """Which rows make each batch. Every row is in exactly one batch an epoch; only one batch may be short.

    The order follows from the seed, the epoch and the lengths alone, on every machine. With `group_by_length`, rows are
    shuffled, sorted by length within stretches of 50 batches, cut into batches, and the batches shuffled.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, group_by_length: bool = True) -> None:
        """lengths: tokens of each row. batch_size: rows a batch. Raises UsageError for a batch_size under 1."""
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, came {batch_size}")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as row numbers."""
        # Seeded with text: random.Random hashes it with SHA-512, which no interpreter's hash seed changes.
        draw = random.Random(f"{self.seed}:{epoch}")
        rows = list(range(len(self.lengths)))
        draw.shuffle(rows)
        if not self.group_by_length:
            return self._cut(rows)
        stretch = self.batch_size * MEGABATCH
        stretches = (rows[begin : begin + stretch] for begin in range(0, len(rows), stretch))
        rows = [row for part in stretches for row in sorted(part, key=self.lengths.__getitem__, reverse=True)]
        batches = self._cut(rows)
        draw.shuffle(batches)
        return batches

    def evaluation(self) -> list[list[int]]:
        """The batches for measuring: all rows, longest first (too large a batch fails at once), nothing drawn."""
        return self._cut(sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True))

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[begin : begin + self.batch_size]) for begin in range(0, len(rows), self.batch_size)]


class TokenOrder:
    """Batches of a bounded number of tokens: each holds as many rows of like length as fit. Every row once an epoch.

    Rows are sorted by length, those of one length shuffled, and cut where rows times the longest of them would pass
    `batch_tokens`; then the batches are shuffled. Where it is cut follows from the lengths alone, so every epoch has as
    many batches. A row longer than `batch_tokens` comes alone. Deterministic as BatchOrder is.
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        """lengths: tokens of each row. batch_tokens: the most tokens of a batch, padding included. Raises UsageError."""
        if batch_tokens < 1:
            raise UsageError(f"batch_tokens must be at least 1, came {batch_tokens}")
        self.lengths = list(lengths)
        self.batch_tokens = batch_tokens
        self.seed = seed
        self._count = len(self.evaluation())

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return self._count

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as row numbers."""
        draw = random.Random(f"{self.seed}:{epoch}")
        rows = list(range(len(self.lengths)))
        draw.shuffle(rows)
        batches = self._cut(rows)
        draw.shuffle(batches)
        return batches

    def evaluation(self) -> list[list[int]]:
        """The batches for measuring: all rows, longest first, nothing drawn."""
        return self._cut(range(len(self.lengths)))

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        left = 0
        for row in sorted(rows, key=self.lengths.__getitem__, reverse=True):  # stable, in reverse too
            if not left:
                batches.append([])
                left = max(1, self.batch_tokens // max(1, self.lengths[row]))  # the first of a batch is its longest
            batches[-1].append(row)
            left -= 1
        return batches
