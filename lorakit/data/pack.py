"""Several examples in one row: batches with next to no padding.

A packed batch says by `segments` which tokens are of one example; whoever runs a model on it keeps them apart
(lorakit.train.packed), so that an example's loss and gradient are those that it has alone.
"""

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.gemm import aligned, backend
from lorakit.data.batch import labels_of, padded
from lorakit.data.encode import CAUSAL_LM, CLASSIFICATION, IGNORE, Encoded
from lorakit.errors import UsageError

SEGMENTS = "segments"
"""The key by which a batch is known to be packed."""
PACK_LENGTH = 256
"""The most tokens of a packed row, unless an example alone has more: attention pays for the square of it."""
SQUARE = 3000
"""A row of this length costs twice what its tokens do alone: attention's share, length / (6 hidden), of a model of
some 500 hidden (4 length hidden FLOPs a token against 24 hidden^2)."""

WORTH = 0.97
"""Rows are packed where that costs at most this much of what padding does: masks of their own are not free."""


WASTE = 16
GAIN = 7
"""Packed rows are lengthened by at most a 16th for products that are a 7th faster, at the least."""


def pack_rows(lengths: Sequence[int], limit: int = PACK_LENGTH) -> list[list[int]]:
    """Which examples share a row: numbers into `lengths`, rows of at most `limit` tokens (or of the longest example).

    Every number of rows that could pay is tried, the longest example first into the emptiest row, and the cheapest
    kept; all rows are padded to the longest, so equal rows beat full ones. One example a row where packing saves too little.
    """
    if not lengths:
        return []
    longest, total = max(lengths), sum(lengths)
    limit = max(limit, longest)
    best, least = [[number] for number in range(len(lengths))], WORTH * _cost(len(lengths), longest)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for count in range(-(-total // limit), len(lengths)):
        if _cost(count, longest) >= least:  # more rows cannot be cheaper
            break
        rows, fullest = _spread(order, lengths, count)
        if fullest <= limit and _cost(count, fullest) < least:
            best, least = rows, _cost(count, fullest)
    return best


def _cost(rows: int, length: int) -> float:
    length = _length(rows, length)
    slow = 1 if aligned(rows * length) == rows * length or not _lengthened() else 1 + 1 / GAIN
    return rows * length * (1 + length / SQUARE) * slow


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """`count` rows, and the tokens of the fullest."""
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for number in order:
        filled, row = heap[0]
        heapq.heapreplace(heap, (filled + lengths[number], row))
        rows[row].append(number)
    return [sorted(row) for row in rows], max(heap)[0]


def collate_packed(
    items: Sequence[Encoded], rows: Sequence[Sequence[int]], *, pad_id: int, task: str
) -> dict[str, Tensor]:
    """One batch whose rows hold the items that `rows` (of `pack_rows`) names, padded right to the longest row or a little more.

    Returns input_ids (rows, seq); segments (rows, seq): 1, 2, ... for a row's examples, 0 at padding; token_type_ids
    (rows, seq) where the items have them; labels: for causal-lm (rows, seq), -100 at padding and at each example's first
    token, which nothing before it predicts; for sequence-classification (examples,), row by row. Raises UsageError.
    """
    if task not in (CAUSAL_LM, CLASSIFICATION):
        raise UsageError(f"rows are packed for {CAUSAL_LM} and {CLASSIFICATION}, not for {task}. Set packing to false.")
    if not items or sorted(number for row in rows for number in row) != list(range(len(items))):
        raise UsageError(f"each of the {len(items)} items must be in exactly one row, came {rows}.")
    chosen = [[items[number] for number in row] for row in rows if row]
    flat = [item for row in chosen for item in row]
    least = _length(len(chosen), max(sum(len(item.input_ids) for item in row) for row in chosen))
    batch = {
        "input_ids": padded([[one for item in row for one in item.input_ids] for row in chosen], pad_id, least=least),
        SEGMENTS: padded([_numbered(row) for row in chosen], 0, least=least),
    }
    if all(item.token_type_ids is not None for item in flat):
        batch["token_type_ids"] = padded(
            [[one for item in row for one in item.token_type_ids or ()] for row in chosen], 0, least=least
        )
    labels = labels_of(flat, task)  # checks that they are of the task
    if task == CAUSAL_LM:
        labels = padded([[one for item in row for one in _shielded(item)] for row in chosen], IGNORE, least=least)
    return batch | {"labels": labels}


def _length(rows: int, longest: int) -> int:
    """The length of packed rows: a little over the longest where their positions are then a number that the faster products
    take (lorakit.core.gemm.aligned)."""
    if not _lengthened():
        return longest
    lengths = range(longest, longest + longest // WASTE + 1)
    return next((length for length in lengths if aligned(rows * length) == rows * length), longest)


def _lengthened() -> bool:
    return backend() == "onednn" and not torch.cuda.is_available()  # a GPU has no use for it


def _numbered(row: Sequence[Encoded]) -> list[int]:
    return [number for number, item in enumerate(row, start=1) for _ in item.input_ids]


def _shielded(item: Encoded) -> list[int]:
    labels = item.labels if isinstance(item.labels, list) else []
    return [IGNORE, *labels[1:]]


def counts(batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """(examples, real tokens) of a batch, packed or not; batches of images have no tokens."""
    if SEGMENTS in batch:
        segments = batch[SEGMENTS]
        return int(segments.amax(1).sum()), int((segments > 0).sum())
    mask = batch.get("attention_mask")
    return next(iter(batch.values())).shape[0], 0 if mask is None else int(mask.sum())


def positions(segments: Tensor) -> Tensor:
    """The place of each token in its example, from 0. segments: (rows, seq); returns (rows, seq) int64.

    Padding counts from 0 too: to whoever goes by restarting positions it is an example of its own.
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - (place * begins).cummax(1).values


def ends(segments: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    """(row, column) of each example's first or last token, row by row: the order of a packed batch's labels."""
    edge = torch.ones_like(segments, dtype=torch.bool)
    differs = segments[:, 1:] != segments[:, :-1]
    if first:
        edge[:, 1:] = differs
    else:
        edge[:, :-1] = differs
    row, column = (edge & (segments > 0)).nonzero(as_tuple=True)
    return row, column
