"""Rows of several examples: all are in, none too long, little padding, and where each begins and ends is known."""

import itertools
import random

import pytest
import torch

from lorakit.data import IGNORE, Encoded, pack
from lorakit.data.pack import SEGMENTS, SQUARE, collate_packed, counts, ends, pack_rows, positions
from lorakit.errors import UsageError


def filled(rows, lengths):
    return [sum(lengths[number] for number in row) for row in rows]


def cost(rows, lengths):
    longest = max(filled(rows, lengths))
    return len(rows) * longest * (1 + longest / SQUARE)


def partitions(numbers):
    """All ways to put numbers into rows."""
    if not numbers:
        yield []
        return
    first, *rest = numbers
    for others in partitions(rest):
        yield [[first], *others]
        for at in range(len(others)):
            yield [*others[:at], [first, *others[at]], *others[at + 1 :]]


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_row_within_the_limit(seed):
    draw = random.Random(seed)
    lengths = draw.choices(range(1, 120), k=draw.randint(1, 40))
    for limit in (1, 64, 256, 10_000):
        rows = pack_rows(lengths, limit)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(row == sorted(row) for row in rows)
        assert max(filled(rows, lengths)) <= max(limit, *lengths)
        assert cost(rows, lengths) <= cost([[number] for number in range(len(lengths))], lengths)
        assert rows == pack_rows(lengths, limit)


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_of_all_ways(seed):
    draw = random.Random(seed)
    lengths = draw.choices(range(5, 60), k=7)
    best = min(
        cost(rows, lengths) for rows in partitions(list(range(7))) if max(filled(rows, lengths)) <= max(100, *lengths)
    )
    assert cost(pack_rows(lengths, 100), lengths) <= 1.15 * best


def test_equal_lengths_stay_apart():
    assert pack_rows([30] * 8, 256) == [[number] for number in range(8)]
    assert pack_rows([], 256) == []
    assert pack_rows([500, 3, 4], 256) == [[0], [1, 2]]


def items(task, *lengths, types=False):
    draw = random.Random(1)
    made = []
    for number, length in enumerate(lengths):
        ids = [draw.randint(3, 90) for _ in range(length)]
        labels = [IGNORE] + ids[1:] if task == "causal-lm" and number else list(ids)
        made.append(
            Encoded(ids, number if task != "causal-lm" else labels, number, [number % 2] * length if types else None)
        )
    return made


def test_a_packed_batch_of_text():
    a, b, c = items("causal-lm", 3, 2, 4)
    batch = collate_packed([a, b, c], [[0, 1], [2]], pad_id=9, task="causal-lm")
    assert set(batch) == {"input_ids", SEGMENTS, "labels"}
    assert batch["input_ids"].tolist() == [a.input_ids + b.input_ids, [*c.input_ids, 9]]
    assert batch[SEGMENTS].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    # the first token of an example is no target: before it stands another example
    assert batch["labels"].tolist() == [
        [IGNORE, *a.input_ids[1:], IGNORE, b.input_ids[1]],
        [IGNORE, *c.input_ids[1:], IGNORE],
    ]
    assert counts(batch) == (3, 9)


def test_a_packed_batch_of_classes_goes_row_by_row():
    rows = items("sequence-classification", 3, 2, 4, types=True)
    batch = collate_packed(rows, [[2], [0, 1]], pad_id=0, task="sequence-classification")
    assert batch["labels"].tolist() == [2, 0, 1]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert batch["input_ids"][tuple(place[1] for place in ends(batch[SEGMENTS], first=True))] == rows[0].input_ids[0]
    scores = [Encoded([1], 0.5, 1), Encoded([1, 2], 2.0, 1)]
    batch = collate_packed(scores, [[0, 1]], pad_id=0, task="sequence-classification")
    assert batch["labels"].dtype == torch.float32


@pytest.mark.parametrize(
    ("backend", "gpu", "length"), [("onednn", False, 144), ("onednn", True, 143), ("torch", False, 143)]
)
def test_packed_rows_are_lengthened_for_the_faster_products_alone(monkeypatch, backend, gpu, length):
    """2 x 143 positions are no number of theirs, 2 x 144 are; what is added is padding, and bears no loss."""
    monkeypatch.setattr(pack, "backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    items = [Encoded([5] * count, [5] * count, 0) for count in (100, 43, 140)]
    batch = collate_packed(items, [[0, 1], [2]], pad_id=9, task="causal-lm")
    assert {value.shape for value in batch.values()} == {(2, length)}
    outside = batch[SEGMENTS] == 0
    assert int(outside.sum()) == 2 * length - 283
    assert (batch["input_ids"][outside] == 9).all()
    assert (batch["labels"][outside] == IGNORE).all()


def test_counts_of_plain_batches():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert counts({"input_ids": mask, "attention_mask": mask}) == (2, 3)
    assert counts({"pixel_values": torch.zeros(5, 3, 2, 2), "labels": torch.zeros(5)}) == (5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_places_and_ends_against_counting(seed):
    draw = random.Random(seed)
    rows = [[draw.randint(1, 6) for _ in range(draw.randint(1, 5))] for _ in range(6)]
    width = max(map(sum, rows)) + 2
    numbered = [[n for n, length in enumerate(row, 1) for _ in range(length)] for row in rows]
    segments = torch.tensor([row + [0] * (width - len(row)) for row in numbered])
    places = [[place for length in [*row, width - sum(row)] for place in range(length)] for row in rows]
    assert positions(segments).tolist() == places
    starts = [(at, sum(row[:n])) for at, row in enumerate(rows) for n in range(len(row))]
    assert list(zip(*(one.tolist() for one in ends(segments, first=True)), strict=True)) == starts
    lasts = [(at, sum(row[: n + 1]) - 1) for at, row in enumerate(rows) for n in range(len(row))]
    assert list(zip(*(one.tolist() for one in ends(segments, first=False)), strict=True)) == lasts


def test_what_cannot_be_packed():
    rows = items("causal-lm", 3, 2)
    with pytest.raises(UsageError, match="not for seq2seq"):
        collate_packed(rows, [[0, 1]], pad_id=0, task="seq2seq")
    for bad in ([[0]], [[0, 1], [1]], [[0, 2]], []):
        with pytest.raises(UsageError, match="exactly one row"):
            collate_packed(rows, bad, pad_id=0, task="causal-lm")
    with pytest.raises(UsageError, match="another task"):
        collate_packed(rows, [[0, 1]], pad_id=0, task="sequence-classification")
