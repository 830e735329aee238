"""The losses of many adapters from one forward pass: each the sum over its own rows of the shared batch."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.attach.adapted import plain
from lorakit.core import kernels
from lorakit.core.cross_entropy import grouped_cross_entropy
from lorakit.data import IGNORE
from lorakit.errors import UsageError
from lorakit.train.head import hidden_states, summed_cross_entropy

Batch = Mapping[str, Tensor]
FILL = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORE}


def together(batches: Sequence[Batch], pad_id: int) -> dict[str, Tensor]:
    """One batch of all rows, in order; those of unlike lengths padded to the right to the longest.

    Raises UsageError where the batches hold unlike inputs.
    """
    keys = list(batches[0])
    if any(list(one) != keys for one in batches):
        raise UsageError(
            "adapters that are trained at once need batches of the same inputs. Train them with at_once=1."
        )
    return {key: _stacked([one[key] for one in batches], FILL.get(key, pad_id)) for key in keys}


def _stacked(parts: Sequence[Tensor], fill: int) -> Tensor:
    if parts[0].dim() != 2:  # labels of classes, images
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])


def joint_losses(model: nn.Module, batch: Batch, rows: Sequence[int], task: str, smoothing: float) -> Tensor:
    """The summed loss of each member, (members,), with gradients. rows: how many rows of the batch are each one's."""
    if task == "causal-lm":
        return _causal(model, batch, rows, smoothing)
    if task == "seq2seq":
        return _seq2seq(model, batch, rows, smoothing)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits  # (rows, classes)
    parts = zip(torch.split(logits, list(rows)), torch.split(batch["labels"], list(rows)), strict=True)
    return torch.stack([_classified(one, labels, smoothing) for one, labels in parts])


def _classified(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    if labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(-1).float(), labels, reduction="sum")
    return functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def _causal(model: nn.Module, batch: Batch, rows: Sequence[int], smoothing: float) -> Tensor:
    """Position t predicts token t + 1. The head runs only where some member has a target."""
    shifted = batch["labels"][:, 1:]  # (rows, seq - 1)
    columns = (shifted != IGNORE).any(0).nonzero().flatten()
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    sliced = _takes_columns(plain(type(model)))
    if sliced:
        inputs |= {"logits_to_keep": columns, "use_cache": False}
    found = None if _head_adapted(model) else hidden_states(model, inputs)
    wanted = shifted[:, columns]
    if found is None:
        logits = model(**inputs).logits
        return _of_logits(logits if sliced else logits[:, columns], wanted, rows, smoothing)
    return _through_head(found[0] if sliced else found[0][:, columns], found[1], wanted, rows, smoothing)


def _seq2seq(model: nn.Module, batch: Batch, rows: Sequence[int], smoothing: float) -> Tensor:
    labels = batch["labels"]
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return _of_logits(model(**batch).logits, labels, rows, smoothing)
    inputs["decoder_input_ids"] = shift(labels=labels)
    found = None if _head_adapted(model) else hidden_states(model, inputs)
    if found is None:
        return _of_logits(model(**inputs).logits, labels, rows, smoothing)
    return _through_head(*found, labels, rows, smoothing)


def _through_head(hidden: Tensor, head: nn.Module, labels: Tensor, rows: Sequence[int], smoothing: float) -> Tensor:
    """From the states that enter a head that is every member's, (rows, seq, dim); labels: (rows, seq)."""
    wanted = labels != IGNORE
    counts = [int(part.sum()) for part in torch.split(wanted, list(rows))]
    chosen, targets = hidden[wanted], labels[wanted]
    weight, bias = head._parameters["weight"], head._parameters.get("bias")
    if weight is not None and weight.dtype == chosen.dtype and not kernels.autocasting(chosen):
        return grouped_cross_entropy(chosen, weight, bias, targets, counts, smoothing)
    parts = zip(torch.split(chosen, counts), torch.split(targets, counts), strict=True)
    return torch.stack([summed_cross_entropy(one, head, own, smoothing) for one, own in parts])


def _of_logits(logits: Tensor, labels: Tensor, rows: Sequence[int], smoothing: float) -> Tensor:
    parts = zip(torch.split(logits, list(rows)), torch.split(labels, list(rows)), strict=True)
    return torch.stack([_token_loss(one, own, smoothing) for one, own in parts])


def _token_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    wanted = labels != IGNORE
    return functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum", label_smoothing=smoothing)


def _head_adapted(model: Any) -> bool:
    """Whether the output head carries an adapter of some member: each row's logits are then its own."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    site = None if head is None else head.__dict__.get("_lk_site")
    return site is not None and bool(site.active)


@cache
def _takes_columns(cls: Any) -> bool:
    return "logits_to_keep" in inspect.signature(cls.forward).parameters
