"""Texts -> ids where two texts meet: what generation is given must be exactly what training put before the answer."""

from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNBOUNDED = 10**9
"""Tokenizers that know no limit give a huge `model_max_length`; from here on it means none."""


def ids_of(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool = False) -> list[int]:
    """The ids of `text`, with the tokenizer's own first and last tokens where `special`."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(ids)


def opening_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text that will be continued: with the begin token, once, if the tokenizer adds one, and without the
    end token that some tokenizers add too (a model would see its input as finished)."""
    ids = ids_of(tokenizer, text, special=True)
    for name in ("eos_token", "sep_token"):
        token: Any = getattr(tokenizer, name)
        added = token is not None and len(ids) > 1 and ids[-1] == getattr(tokenizer, f"{name}_id")
        if added and not text.rstrip().endswith(str(token)):
            ids = ids[:-1]
    begin = tokenizer.bos_token_id
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def continuing_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text that goes on behind others.

    SentencePiece-like tokenizers mark the start of an input as a space; behind a special token most of them don't, so
    the text is read behind the end token, which is taken off again. An end token that swallows blanks cannot serve.
    """
    end = tokenizer.eos_token_id
    if end is not None:
        added = tokenizer.added_tokens_decoder.get(end)
        ids = ids_of(tokenizer, str(tokenizer.eos_token) + text)
        if ids[:1] == [end] and added is not None and not added.rstrip:
            return ids[1:]
    return ids_of(tokenizer, text)


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The end-of-sequence id. Raises DataError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so the model could not learn where an answer ends. "
            "Set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def longest_row(tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> int | None:
    """The most tokens of a row: `max_length`, else what the tokenizer says of its model, else None for no limit."""
    if max_length is not None:
        return max_length
    known = int(tokenizer.model_max_length)
    return known if known < UNBOUNDED else None
