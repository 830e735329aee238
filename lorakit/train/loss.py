"""Losses as (sum, count): a step divides the sum over all its batches by the count over all of them.

So neither gradient accumulation nor the shape of a batch changes what is minimised: the mean over target tokens (or rows).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.data import IGNORE
from lorakit.errors import UsageError
from lorakit.methods.prompt import answering
from lorakit.train.head import hidden_states, summed_cross_entropy

Batch = Mapping[str, Tensor]


class LossSum(NamedTuple):
    """total: the summed loss, with gradients; targets: how many target tokens (or rows) it is a sum over."""

    total: Tensor
    targets: int


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of `loss` over a step's batches, divided by the sum of `targets` over them."""

    loss: Callable[[nn.Module, Batch], LossSum]
    targets: Callable[[Batch], int]
    """How many targets a batch has, told from the batch alone: it is needed before the first forward pass."""


def targets(batch: Batch, task: str) -> int:
    """How many targets a batch has: tokens that carry loss, or rows of a classification or of questions."""
    labels = batch["labels"]
    if task == "causal-lm":
        return int((labels[:, 1:] != IGNORE).sum())
    return int((labels != IGNORE).sum()) if task == "seq2seq" else labels.shape[0]


def objective_for(task: str, *, label_smoothing: float = 0.0) -> Objective:
    """The loss of a task: cross-entropy of next tokens or classes, of an answer's ends, squared error of scores.

    Raises UsageError for label smoothing of an answer's ends: a row's places are no classes that could share it.
    """
    if task == "question-answering" and label_smoothing:
        raise UsageError("label smoothing is of tokens and classes, not of an answer's place. Leave it out.")
    known = {"causal-lm": _causal, "seq2seq": _seq2seq, "question-answering": _span}
    loss = known.get(task, _classification)
    return Objective(lambda model, batch: loss(model, batch, label_smoothing), lambda batch: targets(batch, task))


def custom_objective(loss: Callable[[nn.Module, Batch], Tensor]) -> Objective:
    """A user's `loss(model, batch)`, a mean over the batch's rows, so weighed by them."""

    def summed(model: nn.Module, batch: Batch) -> LossSum:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"a loss must return one number as a tensor, the mean over the batch's rows; came {came}.")
        return LossSum(value.reshape(()) * _rows(batch), _rows(batch))

    return Objective(summed, _rows)


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _causal(model: nn.Module, batch: Batch, smoothing: float) -> LossSum:
    """Position t predicts token t + 1. The head runs only where there is a target."""
    shifted = batch["labels"][:, 1:]  # (batch, seq - 1)
    columns = (shifted != IGNORE).any(0).nonzero().flatten()
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    sliced = _takes_columns(type(getattr(model, "module", model)))
    if sliced:
        inputs |= {"logits_to_keep": columns, "use_cache": False}
    with answering(model, batch["labels"], batch.get("attention_mask")):
        found = hidden_states(model, inputs)
        logits = None if found is not None else model(**inputs).logits  # (batch, columns, vocab)
    if found is None:
        return _cross_entropy(logits if sliced else logits[:, columns], shifted[:, columns], smoothing)
    return _through_head(found, shifted[:, columns], smoothing, None if sliced else columns)


def _seq2seq(model: nn.Module, batch: Batch, smoothing: float) -> LossSum:
    labels = batch["labels"]
    shift = getattr(getattr(model, "module", model), "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:  # with labels the model would compute a loss of its own beside ours
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        inputs["decoder_input_ids"] = shift(labels=labels)
        found = hidden_states(model, inputs)
        if found is not None:
            return _through_head(found, labels, smoothing)
    return _cross_entropy(model(**batch).logits, labels, smoothing)


def _through_head(
    found: tuple[Tensor, nn.Module], labels: Tensor, smoothing: float, columns: Tensor | None = None
) -> LossSum:
    """The loss of the targets among `labels`, (batch, seq), from the hidden states that enter the head."""
    hidden, head = found
    wanted = labels != IGNORE
    rows = (hidden if columns is None else hidden[:, columns])[wanted]  # (targets, dim)
    return LossSum(summed_cross_entropy(rows, head, labels[wanted], smoothing), rows.shape[0])


def _classification(model: nn.Module, batch: Batch, smoothing: float) -> LossSum:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits  # (batch, classes)
    labels = batch["labels"]
    if labels.is_floating_point():
        total = nn.functional.mse_loss(logits.squeeze(-1).float(), labels, reduction="sum")
        return LossSum(total, labels.shape[0])
    return _cross_entropy(logits, labels, smoothing)


def _span(model: nn.Module, batch: Batch, smoothing: float) -> LossSum:
    """The mean of the cross-entropies of the answer's first and last token, over the row's positions (padding is none)."""
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    padding = batch["attention_mask"] == 0
    ends = [one.float().masked_fill(padding, -1e4) for one in (output.start_logits, output.end_logits)]  # (batch, seq)
    first, last = (_cross_entropy(one, batch["labels"][:, side], smoothing).total for side, one in enumerate(ends))
    return LossSum((first + last) / 2, batch["labels"].shape[0])


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> LossSum:
    wanted = labels != IGNORE
    flat = logits[wanted].float()  # (targets, classes): padding and prompts cost no softmax
    total = nn.functional.cross_entropy(flat, labels[wanted], reduction="sum", label_smoothing=smoothing)
    return LossSum(total, flat.shape[0])


@cache
def _takes_columns(cls: Any) -> bool:
    """Whether a model's forward can compute the logits of chosen positions only (transformers' `logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(cls.forward).parameters


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], objective: Objective) -> float:
    """The mean loss over batches, weighed by their targets. The caller sets evaluation mode."""
    total, count = 0.0, 0
    for batch in batches:
        part = objective.loss(model, batch)
        total, count = total + float(part.total), count + part.targets
    return total / max(1, count)
