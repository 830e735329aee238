"""The parts of prefix tuning (lorakit.methods.prefix_tuning): which modules of a model they stand around, and what they do there.

The attention modules run as they are. Each is given a cache that puts the prefix in front of what it hands back, the model's
own cache (where there is one) being asked first, so that the prefix is never stored in it, and a mask in which the tokens see
the prefix. Positions are shifted by the prefix's length, as though it had been read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import is_within, walk
from lorakit.attach.method import Draft, Insert
from lorakit.attach.operation import Operation, Share
from lorakit.errors import AdapterError, TargetError
from lorakit.methods.body import POSITIONS, cache_given, cache_name, is_causal, named, parameters_of
from lorakit.methods.places import hide_early, visible, widened
from lorakit.methods.prompt import AfterPrompt, check_cache, check_one, columns_behind, past_of

BEHIND = "lorakit_behind"  # what a backbone hands to its attention modules where there is an infix
KEYS = ("k_proj", "key")  # what transformers calls the projection to the keys
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
KNOWN = {"update", "is_updated", "self_attention_cache", "cross_attention_cache"}


def prefix_draft(
    path: str,
    body: nn.Module,
    length: int,
    infix: int,
    shapes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, dict[str, Tensor]],
) -> Draft:
    """The draft of a prefix of `length` and an infix. shapes: attention's path below the backbone -> (heads, width of a head);
    tensors: theirs."""
    inside = f"{path}." if path else ""
    causal, draft = is_causal(body), Draft()
    if infix and causal:
        draft.inserts[path] = {"behind": Insert(Behind(), {})}
    for below in position_modules(body) if length else ():
        draft.inserts[inside + below] = {"shift": Insert(Shift(length), {})}
    for number, (below, (heads, width)) in enumerate(shapes.items()):
        operation = Prefix(length, infix, heads, width, causal, counted=number == 0)
        draft.inserts[inside + below] = {"prefix": Insert(operation, tensors[below])}
    return draft


def attentions(body: nn.Module) -> dict[str, nn.Module]:
    """path -> each innermost module of a backbone whose forward takes a key/value cache. Raises TargetError with the reason."""
    kind = type(body).__name__
    taking = {path: one for path, one in walk(body) if path and cache_name(one) is not None}
    found = {
        path: one
        for path, one in taking.items()
        if not any(other != path and is_within(other, path) for other in taking)
    }
    if not found:
        raise TargetError(
            f"prefix tuning puts keys and values into attention by its cache, which {kind}'s attention does not take. Use "
            "lorakit.PromptEmbedding or lorakit.PromptTuning there."
        )
    if getattr(body, "config", None) is not None and getattr(body.config, "add_cross_attention", False):  # type: ignore[union-attr]
        raise TargetError(f"prefix tuning is for self-attention, and this {kind} has cross-attention too.")
    for path, one in found.items():
        unknown = _reads(plain(type(one)), cache_name(one)) - KNOWN
        if unknown:
            raise TargetError(
                f"prefix tuning: {path} ({plain(type(one)).__name__}) reads {', '.join(sorted(unknown))} of its cache, so a "
                "prefix cannot be put in front. Use lorakit.PromptEmbedding there."
            )
    return found


@cache
def _reads(cls: Any, name: str) -> frozenset[str]:
    """What a module's forward reads of the cache that it is given under that name."""
    return frozenset(re.findall(rf"\b{name}\.(\w+)", getsource(cls.forward)))


def heads_of(body: Any, path: str, attention: Any) -> tuple[int, int]:
    """(key and value heads, width of each) of an attention module. Raises TargetError where its keys cannot be told."""
    config = body.config.get_text_config()
    children = attention._modules
    width = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = next((children[name] for name in KEYS if name in children), None)
    if width is not None and keys is not None and keys.out_features % width == 0:
        return keys.out_features // width, width
    if width is None or not any(name in children for name in FUSED):
        raise TargetError(
            f"prefix tuning: it is not known which keys and values {path} ({plain(type(attention)).__name__}) has. Use "
            "lorakit.PromptEmbedding there."
        )
    return heads, width


def position_modules(body: nn.Module) -> list[str]:
    """The paths of the modules that take position ids: a table of positions, or a rotation. Raises TargetError."""
    found = []
    for path, module in walk(body):
        rotary = any(name.endswith("inv_freq") for name in module._buffers) and "position_ids" in parameters_of(
            plain(type(module))
        )
        table = path.rpartition(".")[2] in POSITIONS and isinstance(module, nn.Embedding)
        found += [path] if rotary or table else []
    if not found:
        raise TargetError(
            f"prefix tuning moves positions behind the prefix, and {type(body).__name__} has no module that takes them. Use "
            "lorakit.PromptEmbedding there."
        )
    return found


@dataclass(frozen=True)
class Shift(Operation):
    """Around a module that takes position ids: `length` more of each (RoBERTa's padding stays where it is)."""

    by_token: ClassVar[bool] = False

    length: int

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
        name = "position_ids" if "position_ids" in parameters_of(plain(type(module))) else "input"
        ids = given.get(name)
        if ids is None:
            raise AdapterError(f"{type(module).__name__} was given no position ids that a prefix could move.")
        padding = getattr(module, "padding_idx", None)
        moved = ids + self.length if padding is None else torch.where(ids == padding, padding, ids + self.length)
        return call(**{**given, name: moved}) if name != "input" else call(moved)


@dataclass(frozen=True)
class Behind(AfterPrompt):
    """Around a decoder's backbone: tells its attention modules behind which column each row's prompt ends."""

    by_token: ClassVar[bool] = False

    @property
    def has_infix(self) -> bool:
        return True

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
        mask, past = given.get("attention_mask"), past_of(cache_given(module, given))
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, length = tokens.shape[:2]  # type: ignore[union-attr]
        if past:  # what goes on is behind its prompt
            check_one(tokens)
            behind = torch.zeros(rows, dtype=torch.long, device=tokens.device)  # type: ignore[union-attr]
        elif mask is not None and mask.dim() != 2:
            raise AdapterError(
                "an infix stands behind each row's prompt, which an attention mask of queries and keys does not tell. Give "
                "the model a mask of (rows, tokens)."
            )
        else:
            behind = columns_behind(module, rows, length, mask, tokens.device)  # type: ignore[union-attr]
        return call(**given, **{BEHIND: behind})


@dataclass(frozen=True)
class Prefix(Operation):
    """Around an attention module. Tensors: keys and values, (length + infix, heads * width) each, or an MLP's that makes them."""

    by_token: ClassVar[bool] = False

    length: int
    infix: int
    heads: int
    width: int
    causal: bool
    counted: bool = False
    """Whether this one of the layers' speaks for the positions that they all take together."""

    @property
    def positions(self) -> int:
        return self.length if self.counted else 0

    def pair(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(keys, values), (length + infix, heads * width) each."""
        if "keys" in tensors:
            return tensors["keys"], tensors["values"]
        hidden = torch.tanh(F.linear(tensors["vectors"], tensors["first_weight"], tensors["first_bias"]))
        keys, values = F.linear(hidden, tensors["second_weight"], tensors["second_bias"]).chunk(2, -1)
        return keys, values

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
        held = cache_given(module, given)
        check_cache(held)
        keys, values = (one.unflatten(1, (self.heads, self.width)).transpose(0, 1) for one in self.pair(tensors))
        behind = given.pop(BEHIND, None)
        if self.infix and self.causal and behind is None:
            raise AdapterError(
                f"this model does not hand on to {type(module).__name__} what its backbone is given, so an infix cannot be "
                "placed. Set infix_length to 0."
            )
        given["attention_mask"] = self._mask(module, given, held, behind)
        given[cache_name(module)] = Ahead(held, keys, values)  # type: ignore[index]  # attentions() found it
        return call(**given)

    def _mask(self, module: Any, given: Mapping[str, Any], held: Any, behind: Tensor | None) -> Tensor | None:
        """The mask with the prefix in it. behind: (rows,), see Behind."""
        mask, kind = given.get("attention_mask"), module.config._attn_implementation
        if kind not in ("eager", "sdpa"):
            raise AdapterError(
                f"a prefix needs attention whose masks say which query sees which key, not {kind!r}. Load the model with "
                "attn_implementation='sdpa' or 'eager'."
            )
        states, count = given["hidden_states"], self.length + self.infix
        own = given.get("is_causal")
        causal = getattr(module, "is_causal", True) if own is None else own
        if mask is not None:
            mask = widened(mask, count, queries=False, causal=self.causal)
        elif causal and kind == "sdpa" and states.shape[1] > 1:
            mask = visible(states.shape[1], past_of(held, module.layer_idx), count, states.device)
        if mask is None or behind is None or not self.infix:
            return mask  # None: all is seen, as eager attention takes it
        return hide_early(mask, behind, self.length, self.infix)


class Ahead:
    """A cache, as an attention module sees one, that puts a prefix in front of what `held` (or no cache) gives back."""

    def __init__(self, held: Any, keys: Tensor, values: Tensor) -> None:
        self.held = getattr(held, "self_attention_cache", held)  # of a decoder that could have cross-attention
        self.keys, self.values = keys, values  # heads, length, width

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See transformers.Cache.update. keys, values: (rows, heads, tokens, width)."""
        if self.held is not None:
            keys, values = self.held.update(keys, values, *args, **kwargs)
        return self._joined(self.keys, keys), self._joined(self.values, values)

    def _joined(self, prefix: Tensor, own: Tensor) -> Tensor:
        if (own.shape[1], own.shape[3]) != (prefix.shape[0], prefix.shape[2]):
            raise AdapterError(
                f"this attention has {own.shape[1]} heads of width {own.shape[3]}, and the prefix {prefix.shape[0]} of "
                f"{prefix.shape[2]}: prefix tuning does not fit it. Use lorakit.PromptEmbedding."
            )
        return torch.cat([prefix.to(own)[None].expand(own.shape[0], -1, -1, -1), own], 2)
