"""The frozen-prefix cache: each row's states below the first adapted block, computed once and fed in from then on."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.data.batch import ROWS
from lorakit.data.pack import SEGMENTS
from lorakit.errors import UsageError
from lorakit.train.loss import Batch, LossSum, Objective
from lorakit.train.prefix import Prefix, fed, states_below
from lorakit.train.prefix_store import StateStore

GROUP_TOKENS = 1024
"""Rows of one length are computed together up to so many tokens: without padding, and enough to fill a product."""


class PrefixCache:
    """The states of a data set's rows.

    lengths: tokens of each row. collate: row numbers -> their batch, padded on the right where lengths differ.
    Rows are computed in groups of one length that follow from `lengths` alone, so a row's states depend neither on the batch
    that asks first nor on where a run was resumed.
    """

    def __init__(
        self, prefix: Prefix, lengths: Sequence[int], collate: Callable[[Sequence[int]], Batch], store: StateStore
    ) -> None:
        self.prefix, self.lengths, self.collate, self.store = prefix, lengths, collate, store
        self.group: dict[int, list[int]] = {number: group for group in groups(lengths) for number in group}

    def states(self, model: nn.Module, numbers: Sequence[int], batch: Batch) -> Tensor:
        """The states that enter the first adapted block: (rows, seq, width), zero at padding (which nobody attends to).

        numbers: the rows of the batch, in the order of their tokens. Raises UsageError where its tokens are not theirs.
        """
        real = self._real(numbers, batch)
        for number in numbers:
            if number not in self.store:
                self._compute(model, self.group[number], real.device)
        out = torch.zeros((*real.shape, self.prefix.width), dtype=self.prefix.dtype)
        out[real.cpu()] = torch.cat([self.store.get(number) for number in numbers])
        return out.to(real.device)

    def _real(self, numbers: Sequence[int], batch: Batch) -> Tensor:
        """Which places of the batch are tokens and not padding: (rows, seq), boolean."""
        wanted = torch.tensor([self.lengths[number] for number in numbers])
        if SEGMENTS in batch:
            real = batch[SEGMENTS] > 0
            fits = int(real.sum()) == int(wanted.sum())
        else:
            real = batch["attention_mask"].bool()
            fits = torch.equal(torch.arange(real.shape[1]) < wanted[:, None], real.cpu())
        if not fits:
            raise UsageError(
                "the prefix cache takes whole rows of its data set: packed, or one to a line and padded on the right."
            )
        return real

    def _compute(self, model: nn.Module, numbers: Sequence[int], device: torch.device) -> None:
        batch = {key: value.to(device) for key, value in self.collate(numbers).items() if key != "labels"}
        for number, states in zip(numbers, states_below(model, self.prefix, batch), strict=True):
            self.store.put(number, states)


def groups(lengths: Sequence[int], tokens: int = GROUP_TOKENS) -> list[list[int]]:
    """The row numbers in groups of one length and at most `tokens` tokens (a longer row is alone)."""
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = found[-1] if found else []
        if last and lengths[last[0]] == lengths[number] and (len(last) + 1) * lengths[number] <= tokens:
            last.append(number)
        else:
            found.append([number])
    return found


def cached_objective(objective: Objective, cache: PrefixCache) -> Objective:
    """The same objective for batches that carry their row numbers (ROWS), without running the lower blocks again."""

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        inputs = {key: value for key, value in batch.items() if key != ROWS}
        states = cache.states(model, batch[ROWS].tolist(), inputs)
        with fed(cache.prefix, states):
            return objective.loss(model, inputs)

    return replace(objective, loss=loss)


@torch.no_grad()
def check_exact(model: nn.Module, cache: PrefixCache, numbers: Sequence[int]) -> None:
    """Raise UsageError where the model's outputs on these rows, in evaluation mode, are others with the cache than without.

    A model may hand more from block to block than hidden states; this tells it. The caller sets the mode.
    """
    batch = {key: value for key, value in cache.collate(numbers).items() if key != "labels"}
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    plain = model(**inputs).logits.float()
    with fed(cache.prefix, cache.states(model, numbers, inputs)):
        ours = model(**inputs).logits.float()
    if plain.dim() == 3:
        real = inputs["attention_mask"].bool()
        plain, ours = plain[real], ours[real]
    coarse = cache.prefix.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    far = float((plain - ours).abs().max() / plain.abs().max().clamp(min=1e-3))
    if not far < (5e-2 if coarse else 1e-4):
        raise UsageError(
            f"{type(model).__name__} hands more from block to block than hidden states: with them kept its outputs are off "
            f"by {far:.1e} of the largest."
        )
