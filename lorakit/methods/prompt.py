"""Trained vectors among a sequence's embeddings, before the first layer: what prompt tuning, P-tuning, prefix-embedding and
WARP have in common.

The operation stands around the model's backbone: it embeds the tokens, puts the virtual ones among them, extends masks,
positions and token types, and takes the virtual ones out of what comes back, so that heads, losses and generation see the
sequence that they gave. With a key/value cache the virtual tokens go in with the first tokens, and stay in the cache.

Outputs. A decoder gives each token its own; where an infix follows the prompt, the prompt's last token gets the infix's last
output, for that is what predicts the answer. An encoder gives the first token the first virtual one's: classification heads
read position 0, where PEFT's prompts put it, and a folder gives the same logits there. Rows of a decoder don't depend on how
they are padded; an encoder with relative positions (DeBERTa) wants its padding on the right, as lorakit's batches have it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.alone import operations_on
from lorakit.attach.operation import Operation, Share
from lorakit.errors import AdapterError, UsageError
from lorakit.methods.body import backbone, cache_given, embedding_of, is_causal, named, origin
from lorakit.methods.places import Places, first_real, last_real, widened

IGNORE = -100  # the label of a token that carries no loss
ENDS = "_lk_ends"  # where `ends` leaves its lengths on a backbone, while its with-statement runs


@contextmanager
def ends(model: nn.Module, lengths: Tensor) -> Iterator[None]:
    """Within, an infix stands behind each row's first lengths[i] tokens, padding not counted, not behind its last.

    lengths: (rows,) of whole numbers: how long each row's prompt is, where its answer follows in the same row (training).
    For prompts and prefixes alike. The with-statement may be left out: the whole row is then the prompt.
    """
    if lengths.dim() != 1:
        raise UsageError(f"lengths must be one number a row, not of shape {tuple(lengths.shape)}.")
    body = backbone(model, "lorakit.methods.prompt.ends")[1]
    before = body.__dict__.get(ENDS)
    body.__dict__[ENDS] = lengths
    try:
        yield
    finally:
        body.__dict__.pop(ENDS)
        if before is not None:
            body.__dict__[ENDS] = before


@contextmanager
def answering(model: nn.Module, labels: Tensor, mask: Tensor | None) -> Iterator[None]:
    """`ends` at the first label of each row that counts (is not -100): what stands before it is the prompt. It does nothing
    where no adapter that is on has an infix.

    model: perhaps wrapped (DistributedDataParallel). labels: (rows, tokens), each at its own token's place; mask: the same
    shape, 0 at padding, or None. A row without such a label is a prompt from end to end.
    """
    inner = getattr(model, "module", model)
    if not has_infix(inner):
        yield
        return
    mask = torch.ones_like(labels) if mask is None else mask
    counts = labels != IGNORE
    columns = torch.where(counts.any(1), counts.long().argmax(1), last_real(mask))
    with ends(inner, (columns - first_real(mask)).clamp(min=0)):
        yield


def columns_behind(module: nn.Module, rows: int, length: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """The column behind each row's prompt: (rows,). mask: (rows, length), 0 at padding, where there is one."""
    lengths = module.__dict__.get(ENDS)
    if lengths is None:
        return torch.full((rows,), length, device=device) if mask is None else last_real(mask)
    if rows % len(lengths):
        raise UsageError(f"lorakit.methods.prompt.ends was given {len(lengths)} lengths for a batch of {rows} rows.")
    lengths = lengths.to(device).repeat_interleave(rows // len(lengths))
    return (lengths if mask is None else first_real(mask) + lengths).clamp(0, length)


def past_of(cache: Any, layer: int = 0) -> int:
    """How many positions a layer of a key/value cache holds."""
    return 0 if cache is None else int(cache.get_seq_length(layer))


def check_one(tokens: Any) -> None:
    """Raise AdapterError where several tokens a row go on from a cache, with an infix: are they prompt still, or answer?"""
    if tokens.shape[1] > 1:
        raise AdapterError(
            f"an infix stands behind the prompt, and {tokens.shape[1]} tokens a row came on a key/value cache that is filled: "
            "whether they are still prompt is not known. Give the model whole prompts (no prefill_chunk_size, no assisted "
            "decoding), or train without an infix."
        )


def has_infix(model: nn.Module) -> bool:
    """Whether an adapter that is on puts something behind the prompt."""
    return any(isinstance(one, AfterPrompt) and one.has_infix for one in operations_on(model))


def check_cache(cache: Any) -> None:
    """Raise AdapterError for a cache of a fixed size."""
    if getattr(cache, "is_compileable", False):
        raise AdapterError(
            "a static key/value cache has no room for virtual tokens. Leave cache_implementation to its default."
        )


class AfterPrompt(Operation):
    """An operation that may have to know where each row's prompt ends (see `ends`)."""

    @property
    @abstractmethod
    def has_infix(self) -> bool:
        """Whether it does."""


@dataclass(frozen=True)
class Prompt(AfterPrompt):
    """Around a backbone. Tensors: prefix (prefix, dim) and infix (infix, dim), each where there is one."""

    by_token: ClassVar[bool] = False

    prefix: int
    infix: int
    causal: bool
    """Whether tokens see only what stands before them."""
    origin: int | None
    """RoBERTa's padding_idx, behind which its positions begin; None = they begin at 0."""

    @classmethod
    def on(cls, body: nn.Module, prefix: int, infix: int, **more: Any) -> "Prompt":
        """The operation for one backbone."""
        return cls(prefix=prefix, infix=infix, causal=is_causal(body), origin=origin(body), **more)

    @property
    def positions(self) -> int:
        return self.prefix + self.infix

    @property
    def has_infix(self) -> bool:
        return self.infix > 0

    @property
    def first(self) -> bool:
        """Whether the first token gets the first virtual one's output."""
        return not self.causal

    def vectors(self, module: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(prefix, infix), (n, dim) each, n perhaps 0."""
        some = next(iter(tensors.values()))
        none = some.new_empty(0, some.shape[-1])
        return tensors.get("prefix", none), tensors.get("infix", none)

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        share: Share,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not share.strength:
            return call(*args, **kwargs)
        given = named(module, args, kwargs)
        mask, cache = given.get("attention_mask"), cache_given(module, given)
        if isinstance(mask, dict):
            raise AdapterError(f"{type(module).__name__} was given several attention masks: virtual tokens take one.")
        check_cache(cache)
        return self._further(given, call) if past_of(cache) else self._first(module, given, call, tensors)

    def _first(
        self, module: Any, given: dict[str, Any], call: Callable[..., Any], tensors: Mapping[str, Tensor]
    ) -> Any:
        """A sequence from its beginning: the virtual tokens go in."""
        ids, own, mask = given.pop("input_ids", None), given.pop("inputs_embeds", None), given.get("attention_mask")
        if own is None:
            own = embedding_of(module)(ids)
        rows, length = own.shape[:2]
        flat = mask if mask is not None and mask.dim() == 2 else None
        behind = columns_behind(module, rows, length, flat, own.device) if self.infix else None
        places = Places(self.prefix, self.infix, length, behind)
        prefix, infix = (part.to(own)[None] for part in self.vectors(module, tensors))
        given["inputs_embeds"] = places.place(own, prefix, infix)
        given["position_ids"] = self._positions(places, given.get("position_ids"), ids, flat, rows, own.device)
        if flat is not None:
            given["attention_mask"] = places.fill(flat, 1)
        elif mask is not None:
            given["attention_mask"] = self._mask(mask)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = places.fill(given["token_type_ids"], 0)
        return self._stripped(call(**given), places)

    def _mask(self, mask: Tensor) -> Tensor:
        if self.infix:
            raise AdapterError(
                "an infix stands behind each row's prompt, which an attention mask of queries and keys does not tell. Give "
                "the model a mask of (rows, tokens)."
            )
        return widened(mask, self.prefix, queries=True, causal=self.causal)

    def _positions(
        self,
        places: Places,
        came: Tensor | None,
        ids: Tensor | None,
        mask: Tensor | None,
        rows: int,
        device: torch.device,
    ) -> Tensor | None:
        """Position ids with the virtual tokens' own, so that a row's don't depend on its padding; None = one after another."""
        padding = self.origin
        if came is None and padding is not None and ids is not None:  # as RoBERTa makes them
            real = (ids != padding).long()
            came = real.cumsum(1) * real + padding
        elif came is None and mask is not None:
            came = (mask.long().cumsum(1) - 1).clamp(min=0) + (0 if padding is None else padding + 1)
        if came is None:
            return None
        start = 0 if padding is None else padding + 1
        came = came.expand(rows, -1)
        moved = came + self.prefix if padding is None else torch.where(came == padding, padding, came + self.prefix)
        front = torch.arange(self.prefix, device=device)[None] + start
        if places.ends is None:
            return places.place(moved, front, moved[:, :0])
        column = torch.arange(places.length, device=device)[None]
        ahead = places.ends[:, None]
        last = moved.gather(1, (ahead - 1).clamp(min=0))
        behind = torch.where(ahead > 0, last, start + self.prefix - 1) + 1 + torch.arange(self.infix, device=device)
        return places.place(torch.where(column >= ahead, moved + self.infix, moved), front, behind)

    def _further(self, given: dict[str, Any], call: Callable[..., Any]) -> Any:
        """A sequence that goes on: the cache holds the virtual tokens, and the model counts them with it."""
        mask, came = given.get("attention_mask"), given.get("position_ids")
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if self.infix:
            check_one(tokens)
        if came is not None:
            given["position_ids"] = came + self.positions
        elif mask is not None and mask.dim() == 2 and self.origin is None:
            came = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # type: ignore[union-attr]
            given["position_ids"] = came + self.positions
        if mask is None:
            return call(**given)
        if mask.dim() == 2:
            self._check_gap(mask)
            ones = mask.new_ones(mask.shape[0], 1)
            parts = [ones.expand(-1, self.prefix), mask, ones.expand(-1, self.infix)]  # all behind the padding is real
            given["attention_mask"] = torch.cat(parts, 1)
        else:
            given["attention_mask"] = widened(mask, self.positions, queries=False, causal=self.causal)
        return call(**given)

    def _check_gap(self, mask: Tensor) -> None:
        if self.infix and not torch.compiler.is_compiling() and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise AdapterError(
                "with an infix, a sequence that goes on from a key/value cache has its padding on the left alone. Pad prompts "
                "there (padding_side='left')."
            )

    def _stripped(self, output: Any, places: Places) -> Any:
        """The output without the virtual tokens' hidden states."""
        if isinstance(output, tuple):
            return tuple(self._without(one, places) for one in output)
        for key in ("last_hidden_state", "hidden_states"):
            if output.get(key) is not None:
                output[key] = self._without(output[key], places)
        return output

    def _without(self, value: Any, places: Places) -> Any:
        if isinstance(value, tuple):
            return tuple(self._without(one, places) for one in value)
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == places.total:
            return places.strip(value, first=self.first)
        return value
