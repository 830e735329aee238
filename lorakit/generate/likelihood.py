"""How likely a model finds given answers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lorakit.data import IGNORE, BatchOrder, Encoded, collate
from lorakit.errors import DataError
from lorakit.generate.modes import device_of, evaluating
from lorakit.methods.prompt import answering


def mean_nll(
    model: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean negative log-likelihood (nats) of a labelled token: each token weighs the same, whatever row it is in.

    rows: encoded for causal-lm (labels at their own token's place; the shift is made here) or for seq2seq, as `model`
    is. progress: called with (rows done, rows in all). Raises DataError where no token counts.
    """
    task = "seq2seq" if model.config.is_encoder_decoder else "causal-lm"
    total, count, done = 0.0, 0, 0
    with evaluating(model):
        for batch in BatchOrder([len(row.input_ids) for row in rows], batch_size, seed=0).evaluation():
            nll, tokens = _batch_nll(model, [rows[row] for row in batch], task)
            total, count, done = total + nll, count + tokens, done + len(batch)
            if progress is not None:
                progress(done, len(rows))
    if count == 0:
        raise DataError("no token counts: every label is -100, or there are no rows. Nothing can be measured.")
    return total / count


def perplexity(
    model: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of `mean_nll`: 1 is certainty, the size of the vocabulary a blind guess. inf where exp overflows."""
    try:
        return math.exp(mean_nll(model, rows, batch_size=batch_size, progress=progress))
    except OverflowError:
        return math.inf


def _batch_nll(model: Any, rows: Sequence[Encoded], task: str) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of a batch's labelled tokens, and how many they are."""
    batch = collate(rows, pad_id=0, task=task)  # any id does: what fills is masked
    batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
    labels = batch["labels"]  # B, T
    if task == "seq2seq":
        logits: Tensor = model(**batch).logits  # B, T, V
    else:
        del batch["labels"]
        with answering(model, labels, batch["attention_mask"]):
            logits = model(**batch, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
    counted = labels != IGNORE
    # Chosen before the cast: fp32 copies of the prompts' logits would be most of the memory.
    nll = F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
    return nll.item(), int(counted.sum())
