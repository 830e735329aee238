"""The losses against transformers' and torch's own."""

import sys

import pytest
import tiny
import torch
from torch import nn

from lorakit.errors import UsageError
from lorakit.train.loss import IGNORE, _takes_columns, custom_objective, mean_loss, objective_for, targets


def mean(model, batch, task, **settings):
    part = objective_for(task, **settings).loss(model, batch)
    assert part.targets == objective_for(task).targets(batch) == targets(batch, task)
    return part.total / part.targets


def test_causal_is_the_models_own_loss_with_and_without_columns(rows, monkeypatch):
    batch = next(rows(6, 6).make(0, 0))
    model = tiny.llama()
    reference = model(**batch).loss
    torch.testing.assert_close(mean(model, batch, "causal-lm"), reference)
    assert _takes_columns(type(model))
    monkeypatch.setattr(sys.modules["lorakit.train.loss"], "_takes_columns", lambda cls: False)
    torch.testing.assert_close(mean(model, batch, "causal-lm"), reference)


def test_only_the_completion_counts(rows):
    batch = next(rows(6, 6).make(0, 0))
    model = tiny.llama()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1).detach()
    total, count = 0.0, 0
    for row in range(6):
        for place in range(1, batch["labels"].shape[1]):
            label = int(batch["labels"][row, place])
            if label != IGNORE:
                total, count = total - float(logits[row, place - 1, label]), count + 1
    assert float(mean(model, batch, "causal-lm").detach()) == pytest.approx(total / count, rel=1e-5)


def test_a_batch_without_targets_is_zero_not_nan():
    model = tiny.llama()
    batch = tiny.batch(model) | {"labels": torch.full((3, 7), IGNORE)}
    part = objective_for("causal-lm").loss(model, batch)
    assert (float(part.total.detach()), part.targets) == (0.0, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classes(smoothing):
    model = tiny.roberta()
    batch = tiny.batch(model, labels=True)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    reference = nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
    torch.testing.assert_close(mean(model, batch, "sequence-classification", label_smoothing=smoothing), reference)


def test_scores():
    model = tiny.bert(num_labels=1, problem_type="regression")
    batch = tiny.batch(model) | {"labels": torch.tensor([0.5, -1.0, 2.0])}
    torch.testing.assert_close(mean(model, batch, "sequence-classification"), model(**batch).loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_seq2seq(smoothing):
    model = tiny.t5()
    batch = tiny.batch(model, labels=True)
    batch["labels"][0, -2:] = IGNORE
    logits = model(**batch).logits
    reference = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, label_smoothing=smoothing
    )
    torch.testing.assert_close(mean(model, batch, "seq2seq", label_smoothing=smoothing), reference)


def test_causal_smoothing_is_torchs(rows):
    batch, model = next(rows(6, 6).make(0, 0)), tiny.gpt2()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    reference = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, label_smoothing=0.1
    )
    torch.testing.assert_close(mean(model, batch, "causal-lm", label_smoothing=0.1), reference)


def test_mean_loss_weighs_by_targets(rows):
    model, data = tiny.llama(), rows(7, 3)
    whole = data.batch(list(range(7)))
    parts = (data.batch(part) for part in ([0, 1, 2], [3, 4, 5], [6]))
    found = mean_loss(model, parts, objective_for("causal-lm"))
    assert found == pytest.approx(float(model(**whole).loss.detach()), rel=1e-5)


def test_a_loss_of_ones_own_is_weighed_by_rows_alone(rows):
    """What it is divided by is rows too: a custom loss is not scaled by the tokens of the task's."""
    objective = custom_objective(lambda model, batch: torch.tensor(3.0))
    batch = next(rows(6, 4).make(0, 0))
    part = objective.loss(tiny.llama(), batch)
    assert (float(part.total), part.targets, objective.targets(batch)) == (12.0, 4, 4)


@pytest.mark.parametrize("value", [1.0, torch.ones(4), None])
def test_a_loss_of_ones_own_that_is_no_number(rows, value):
    objective = custom_objective(lambda model, batch: value)
    with pytest.raises(UsageError, match="must return one number as a tensor"):
        objective.loss(tiny.llama(), next(rows(6, 4).make(0, 0)))
