"""How much a model takes at once."""

from typing import Any

from torch import nn

from lorakit.attach.alone import taken

_UNBOUNDED = 10**9  # a tokenizer that knows no limit gives a huge number


def longest_row(model: Any, tokenizer: Any) -> int | None:
    """The most tokens of a row: the lesser of the model's positions (less those that prefixes and prompts take, where such an
    adapter is on) and its tokenizer's limit; None where neither is.

    Relative positions (T5) have no limit of their own. RoBERTa's kind counts positions from padding_idx + 1, so that
    many of its rows are never used.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    positions = None if positions is None else positions - taken(model)
    known = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and limit < _UNBOUNDED]
    return min(known, default=None)
