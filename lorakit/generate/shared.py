"""What all prompts begin with (a schema, instructions, solved examples) goes through the model once, not once a prompt."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.attach.alone import by_token
from lorakit.attach.host import find_host
from lorakit.methods.body import cache_name

SHORTEST = 32
"""Tokens from which a shared beginning is worth a pass of its own."""


class Beginning:
    """The keys and values of tokens that every row begins with. ids: (tokens,)."""

    def __init__(self, ids: Tensor, cache: Any) -> None:
        self.ids, self._cache = ids, cache

    def of(self, rows: int) -> Any:
        """A cache of its own for so many rows: decoding writes into it."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


@torch.no_grad()
def shared_beginning(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> Beginning | None:
    """The beginning that all `rows` of token ids share; None where it is short, or sharing it would not be exact.

    Rows of different adapters have different keys and values, and virtual tokens have a place of their own: neither is
    shared. The last token of a row is never part of it, for its output is wanted.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    length = _shared_length(rows) if len(rows) > 1 else 0
    host = find_host(model)
    routed = host is not None and host.state.route is not None
    if length < SHORTEST or routed or not by_token(model) or not model._supports_default_dynamic_cache():
        return None
    ids = torch.tensor(rows[0][:length], device=device)
    cache = DynamicCache(config=model.config)
    if any(
        type(layer) is not DynamicLayer for layer in cache.layers
    ):  # a window, or a state that is no keys and values
        return None
    model(input_ids=ids[None], use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
    return Beginning(ids, cache) if cache.get_seq_length() == length else None


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    first, shortest = rows[0], min(map(len, rows)) - 1
    return next((at for at in range(shortest) if any(row[at] != first[at] for row in rows)), shortest)
