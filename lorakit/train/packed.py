"""Training on rows of several examples (lorakit.data.pack): attention that is block-diagonal, positions that restart.

Causal models of transformers make the mask themselves from positions that restart, where there is neither an attention
mask nor a cache (masking_utils.find_packed_sequence_indices). Encoders are given it. A classifier's head is given each
example's own first or last position. No architecture is trusted: `packing_for` tries the model on a handful of tokens.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.alone import by_token
from lorakit.data import Encoded, collate
from lorakit.data.encode import CAUSAL_LM, CLASSIFICATION
from lorakit.data.pack import SEGMENTS, collate_packed, ends, positions
from lorakit.errors import UsageError
from lorakit.models.quiet import quiet
from lorakit.train.loss import Batch, LossSum, Objective

_READS_FIRST = {
    "bert": "bert.pooler",
    "camembert": "classifier",
    "electra": "classifier",
    "roberta": "classifier",
    "xlm-roberta": "classifier",
}
"""Encoders, by their config's model_type -> the module that reads position 0 of the hidden states that it is given."""
_READS_LAST = "score"
"""The head of transformers' classifiers on causal models: it runs on all positions, then one of each row is taken."""
_LENGTHS = ((5, 3), (4, 2))
"""What the trial packs: two rows, one of them padded."""


@dataclass(frozen=True)
class Packing:
    """How one model takes packed rows.

    model: transformers' model itself, not a wrapper of it. first: the module that reads position 0 (encoders). last: the
    one whose outputs are read at the last position (causal classifiers). mask: which block-diagonal mask the model is
    given, "all" (of encoders) or "causal"; None = it makes its own. origin: the number of an example's position 0.
    """

    model: Any
    mask: str | None = None
    first: nn.Module | None = None
    last: nn.Module | None = None
    origin: int = 0

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A packed batch as the model's forward takes it; labels stay."""
        segments = batch[SEGMENTS]
        inputs = {key: value for key, value in batch.items() if key != SEGMENTS}
        inputs["position_ids"] = positions(segments) + self.origin
        if self.mask is not None:
            inputs["attention_mask"] = block_mask(segments, self.model.dtype, causal=self.mask == "causal")
        return inputs

    @contextmanager
    def reading(self, segments: Tensor) -> Iterator[None]:
        """Within, a forward of the model on these rows gives an example's logits in place of a row's, and keeps no cache."""
        config = self.model.config.get_text_config()
        cached = getattr(config, "use_cache", None)
        with ExitStack() as hooks:
            if cached:
                config.use_cache = False  # a cache is taken for a row that goes on
                hooks.callback(setattr, config, "use_cache", cached)
            if self.first is not None:
                _read_first(hooks, self.first, ends(segments, first=True))
            if self.last is not None:
                _read_last(hooks, self.model, self.last, ends(segments, first=False))
            yield


def _read_first(hooks: ExitStack, head: nn.Module, place: tuple[Tensor, Tensor]) -> None:
    """Give the head (examples, 1, hidden), each example's first position, in place of (rows, seq, hidden)."""

    def gather(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given[0][place].unsqueeze(1), *given[1:]

    hooks.callback(head.register_forward_pre_hook(gather).remove)


def _read_last(hooks: ExitStack, model: nn.Module, head: nn.Module, place: tuple[Tensor, Tensor]) -> None:
    """Have the model return (examples, classes): the head's outputs at each example's last position."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output[place])

    def give(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        output.logits = kept.pop()
        return output

    hooks.callback(head.register_forward_hook(keep).remove)
    hooks.callback(model.register_forward_hook(give).remove)


def block_mask(segments: Tensor, dtype: torch.dtype, *, causal: bool) -> Tensor:
    """(rows, 1, seq, seq), to be added to scores: 0 where a token (its row) attends to one of its example, else the least number.

    causal: it attends to none behind it. Padding attends to padding: a softmax over nothing would be no number.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        same = same.tril()
    return torch.zeros(same.shape, dtype=dtype, device=segments.device).masked_fill_(~same, torch.finfo(dtype).min)


def packed_objective(objective: Objective, packing: Packing) -> Objective:
    """`objective` for batches that may be packed; those that are not go through as they are."""

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        if SEGMENTS not in batch:
            return objective.loss(model, batch)
        with packing.reading(batch[SEGMENTS]):
            return objective.loss(model, packing.inputs(batch))

    return Objective(loss, objective.targets)


def packing_for(model: Any, task: str, *, pad_id: int) -> Packing:
    """How `model` takes packed rows, tried out on a few tokens. Raises UsageError, with the reason, where it does not."""
    refused = []
    mode = model.training
    model.eval()  # nothing is drawn: the run's random numbers stay what they are
    try:
        for packing in _candidates(model, task):
            try:
                with quiet(
                    progress=False
                ):  # transformers warns, once, of padding without an attention mask: it is apart
                    _try(packing, task, pad_id)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # UsageError is a ValueError
                refused.append(error)
            else:
                return packing
    finally:
        model.train(mode)
    raise UsageError(f"{type(model).__name__} does not take packed rows: {refused[0]}") from refused[0]


def _candidates(model: Any, task: str) -> list[Packing]:
    """The ways in which a model like this may take packed rows, best first."""
    name = type(model).__name__
    if not by_token(model):
        raise UsageError(
            "an adapter puts tokens of its own into each row, and a packed row's examples would share them."
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise UsageError(f"{name} takes no position_ids, so the examples of a packed row cannot be kept apart.")
    if task not in (CAUSAL_LM, CLASSIFICATION):
        raise UsageError(f"rows are packed for {CAUSAL_LM} and {CLASSIFICATION}, not for {task}.")
    if task == CLASSIFICATION and model.config.model_type in _READS_FIRST:
        head = model.get_submodule(_READS_FIRST[model.config.model_type])
        return [Packing(model, "all", first=head, origin=_origin(model))]
    last = dict(model.named_children()).get(_READS_LAST) if task == CLASSIFICATION else None
    if task == CLASSIFICATION and last is None:
        raise UsageError(f"it is not known which positions the head of {name} reads, so its rows cannot be packed.")
    return [Packing(model, mask, last=last) for mask in (None, "causal")]


def _origin(model: nn.Module) -> int:
    """RoBERTa's kind counts positions from padding_idx + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


@torch.no_grad()
def _try(packing: Packing, task: str, pad_id: int) -> None:
    """Raise UsageError unless each example's logits are what it has alone, whatever stands beside it."""
    model, items = packing.model, _trial(packing.model, task, pad_id)
    alone = {key: value.to(model.device) for key, value in collate(items, pad_id=pad_id, task=task).items()}
    packed, mixed = _logits(packing, items, task, pad_id), []
    expected = _split(model(**_without_labels(alone)).logits, alone["attention_mask"], task)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    for kept in (0, 1):  # every second example stays, the others' tokens change
        changed = [item if number % 2 == kept else _reversed(item) for number, item in enumerate(items)]
        mixed.append(_logits(packing, changed, task, pad_id))
    for number, (own, reference) in enumerate(zip(packed, expected, strict=True)):
        scale = float(reference.abs().max())
        if not float((own - reference).abs().max()) <= tolerance * scale:
            raise UsageError("an example has other outputs in a packed row than alone.")
        if not float((own - mixed[number % 2][number]).abs().max()) <= 1e-6 * scale:
            raise UsageError("the examples of a packed row see each other.")


def _trial(model: Any, task: str, pad_id: int) -> list[Encoded]:
    """Four examples, of ids that differ and are not padding."""
    size = model.get_input_embeddings().weight.shape[0]
    known = [number for number in range(size - 1, max(-1, size - 64), -1) if number != pad_id]
    items, at = [], 0
    for length in (length for row in _LENGTHS for length in row):
        ids = [known[(3 * (at + place)) % len(known)] for place in range(length)]
        items.append(Encoded(ids, ids if task == CAUSAL_LM else 0, 0))
        at += length
    return items


def _reversed(item: Encoded) -> Encoded:
    return Encoded(item.input_ids[::-1], item.labels, 0)


def _logits(packing: Packing, items: list[Encoded], task: str, pad_id: int) -> list[Tensor]:
    """The logits of each example, (tokens, vocab) or (1, classes), from a packed batch."""
    rows, at = [], 0
    for row in _LENGTHS:
        rows.append(list(range(at, at + len(row))))
        at += len(row)
    batch = collate_packed(items, rows, pad_id=pad_id, task=task)
    batch = {key: value.to(packing.model.device) for key, value in batch.items()}
    segments = batch[SEGMENTS]
    with packing.reading(segments):
        logits = packing.model(**_without_labels(packing.inputs(batch))).logits
    if task != CAUSAL_LM:
        return [logits[number : number + 1].float() for number in range(len(logits))]
    one_row_each = [segments[row] == number for row in range(len(_LENGTHS)) for number in (1, 2)]
    return [logits[index // 2][tokens].float() for index, tokens in enumerate(one_row_each)]


def _split(logits: Tensor, mask: Tensor, task: str) -> list[Tensor]:
    if task != CAUSAL_LM:
        return [logits[number : number + 1].float() for number in range(len(logits))]
    return [row[: int(count)].float() for row, count in zip(logits, mask.sum(1), strict=True)]


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
