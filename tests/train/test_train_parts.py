"""Batches run in several passes: the same loss and gradients, less padding, never more positions than allowed."""

import random

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.data import Encoded, collate
from lorakit.data.batch import PASS, ROWS, split_batch
from lorakit.data.pack import SEGMENTS, collate_packed
from lorakit.train.config import TrainConfig
from lorakit.train.loss import objective_for
from lorakit.train.packed import packed_objective, packing_for

TASKS = {"causal-lm": tiny.llama, "seq2seq": tiny.t5, "sequence-classification": tiny.bert}


def rows_of(task, lengths):
    draw = random.Random(5)
    rows = []
    for length in lengths:
        ids = [draw.randrange(3, tiny.VOCAB) for _ in range(length)]
        labels = {"causal-lm": [-100, *ids[1:]], "seq2seq": ids[: max(1, length // 2)]}.get(task, draw.randrange(3))
        rows.append(Encoded(ids, labels, 0))
    return rows


def step(model, batches, objective):
    """(loss, gradients) of one optimizer step."""
    parameters = lk.parameters(model, "a")
    for one in parameters:
        one.grad = None
    total = sum(objective.loss(model, batch).total for batch in batches)
    count = sum(objective.targets(batch) for batch in batches)
    (total / count).backward()
    return [(total / count).detach(), *(one.grad.clone() for one in parameters)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
def test_the_step_is_the_whole_batchs(task, side):
    if task == "sequence-classification" and side == "left":
        pytest.skip("BERT reads its first position")
    model = TASKS[task]().double()
    lk.attach(model, lk.LoRA(r=3, target_modules="all-linear"), name="a")
    batch = collate(rows_of(task, [5, 40, 7, 6, 38, 1, 12]), pad_id=0, task=task, side=side)
    parts = split_batch(batch, 80, task)
    assert 1 < len(parts) < 7
    assert sum(part["input_ids"].shape[0] for part in parts) == 7
    assert all(part["input_ids"].numel() <= 80 for part in parts)
    assert sum(int(part["attention_mask"].sum()) for part in parts) == int(batch["attention_mask"].sum())
    objective = objective_for(task)
    for one, other in zip(step(model, [batch], objective), step(model, parts, objective), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_packed_rows_are_cut_with_their_labels(task):
    model = TASKS[task]().double()
    lk.attach(model, lk.LoRA(r=3, target_modules="all-linear"), name="a")
    batch = collate_packed(rows_of(task, [5, 9, 7, 6, 8]), [[0, 2], [1], [3, 4]], pad_id=0, task=task)
    parts = split_batch(batch, 30, task)
    assert [part["input_ids"].shape[0] for part in parts] == [2, 1]
    assert all(SEGMENTS in part for part in parts)
    objective = packed_objective(objective_for(task), packing_for(model, task, pad_id=0))
    for one, other in zip(step(model, [batch], objective), step(model, parts, objective), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def brute(lengths, most):
    """The least cost over every way to cut rows sorted by length."""
    if not lengths:
        return 0
    return min(
        number * lengths[0] + PASS + brute(lengths[number:], most)
        for number in range(1, len(lengths) + 1)
        if number == 1 or number * lengths[0] <= most
    )


def test_no_other_cut_is_cheaper():
    draw = random.Random(0)
    for _ in range(30):
        lengths = [draw.choice([3, 60, 300, 900]) + draw.randrange(20) for _ in range(draw.randrange(2, 9))]
        most = draw.choice([500, 2000, 10**6])
        batch = collate(rows_of("causal-lm", lengths), pad_id=0, task="causal-lm")
        parts = split_batch(batch, most, "causal-lm")
        assert sum(part["input_ids"].numel() + PASS for part in parts) == brute(sorted(lengths)[::-1], most)


def test_the_target_of_seq2seq_counts():
    rows = [Encoded([5] * 4, [7] * 100, 0) for _ in range(6)]
    parts = split_batch(collate(rows, pad_id=0, task="seq2seq"), 250, "seq2seq")
    assert [len(part["labels"]) for part in parts] == [2, 2, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_row_numbers_go_with_their_rows(packed):
    """What the prefix cache finds its states by; without it a cached run would ignore pass_tokens."""
    rows = [Encoded([10 + k] * length, [10 + k] * length, 0) for k, length in enumerate([5, 40, 7, 6, 38, 1, 12])]
    if packed:
        groups = [[0, 2], [1], [3, 4], [6, 5]]
        batch = collate_packed(rows, groups, pad_id=0, task="causal-lm")
        batch[ROWS] = torch.tensor([number for group in groups for number in group])
    else:
        batch = {**collate(rows, pad_id=0, task="causal-lm"), ROWS: torch.arange(7)}
    parts = split_batch(batch, 80, "causal-lm")
    assert len(parts) > 1
    for part in parts:
        firsts = [list(dict.fromkeys(row[row > 0].tolist())) for row in part["input_ids"]]
        assert [number + 10 for number in part[ROWS].tolist()] == [one for row in firsts for one in row]


def test_what_is_not_cut():
    even = collate(rows_of("causal-lm", [9, 8, 9]), pad_id=0, task="causal-lm")
    assert split_batch(even, 8192, "causal-lm") == [even]
    images = {"pixel_values": torch.ones(4, 3, 8, 8), "labels": torch.zeros(4, dtype=torch.long)}
    assert split_batch(images, 1, "image-classification") == [images]
    extra = {**even, "rows": torch.arange(3)}
    assert split_batch(extra, 10, "causal-lm") == [extra]


def test_the_loop_takes_the_same_steps(make_trainer):
    whole, cut = (make_trainer(TrainConfig(max_steps=4, epochs=9, batch_size=6, lr=5e-3)) for _ in range(2))
    seen = []

    def parts(batch):
        seen.append(split_batch(batch, 40, "causal-lm"))
        return seen[-1]

    cut.parts = parts
    whole.run()
    cut.run()
    assert max(map(len, seen)) > 1
    for one, other in zip(whole.parameters, cut.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)
