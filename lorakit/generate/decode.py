"""Prompts -> answers, on transformers' own decoding."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorakit.data import BatchOrder, Encoded, collate
from lorakit.errors import DataError
from lorakit.generate.config import GenerateConfig
from lorakit.generate.modes import device_of, evaluating, generation_settings, seeded
from lorakit.generate.prompts import Prompt, prompt_ids
from lorakit.generate.shared import Beginning, shared_beginning
from lorakit.methods.body import cache_name
from lorakit.models import longest_row

_KEPT = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What of the model's own generation settings holds here: its special tokens. How to decode is the caller's to say."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The answer to each prompt, in the prompts' order: only what the model wrote, without special tokens.

    model: a decoder or an encoder-decoder. prompts: texts, chats (lists of {"role", "content"}) or examples.
    progress: called with (prompts done, prompts in all) after each batch.
    A row's greedy answer does not depend on the rows beside it (fp32; ties under 1e-4 excepted). Modes, generation
    settings and random generators are as before when it returns.
    Raises DataError, naming the prompt, for an empty one or one that leaves no room for max_new_tokens.
    """
    task = _task(model)
    rows = [
        Encoded(prompt_ids(tokenizer, prompt, task=task, index=index), [], index + 1)
        for index, prompt in enumerate(prompts)
    ]
    lengths = [len(row.input_ids) for row in rows]
    _check_room(model, tokenizer, lengths, config.max_new_tokens)
    answers, done, device = [""] * len(rows), 0, device_of(model)
    settings = _settings(model, tokenizer, config)
    with evaluating(model), generation_settings(model, settings), seeded(config.seed, device):
        beginning = None
        if task == "causal-lm" and config.num_beams == 1:  # transformers repeats no cache for its beams
            beginning = shared_beginning(model, [row.input_ids for row in rows], device)
        for batch in BatchOrder(lengths, config.batch_size, seed=0).evaluation():
            texts = _decode(model, tokenizer, [rows[row] for row in batch], task, config.stop, beginning)
            for row, text in zip(batch, texts, strict=True):
                answers[row] = text
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    return answers


def _task(model: Any) -> str:
    return "seq2seq" if model.config.is_encoder_decoder else "causal-lm"


def _settings(model: Any, tokenizer: Any, config: GenerateConfig) -> Any:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {name: getattr(model.generation_config, name) for name in _KEPT}
    if chosen["eos_token_id"] is None:
        chosen["eos_token_id"] = tokenizer.eos_token_id
    if config.do_sample:
        chosen |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    if config.num_beams > 1:
        chosen |= {"length_penalty": config.length_penalty}
    chosen |= {
        "pad_token_id": tokenizer.pad_token_id,
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "do_sample": config.do_sample,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "use_cache": True,  # training may have switched it off in the model's config
    }
    return GenerationConfig.from_dict(chosen)


def _decode(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    task: str,
    stop: tuple[str, ...],
    beginning: Beginning | None,
) -> list[str]:
    # A decoder's answer must start right behind its prompt; an encoder reads from position 0.
    side = "right" if task == "seq2seq" else "left"
    shared = 0 if beginning is None else len(beginning.ids)
    own = [replace(row, input_ids=row.input_ids[shared:]) for row in rows]
    batch = collate(own, pad_id=tokenizer.pad_token_id, task=task, side=side)
    ids, mask = (batch[key].to(device_of(model)) for key in ("input_ids", "attention_mask"))  # B, T
    extra = {}
    if beginning is not None:  # it stands before the padding
        ids = torch.cat([beginning.ids.expand(len(rows), -1), ids], 1)
        mask = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
        extra = {cache_name(model): beginning.of(len(rows))}
    start = 1 if task == "seq2seq" else ids.shape[1]  # a separate decoder begins with one start token
    # The mask is given, never guessed from pad ids: the pad token may be a token of the text (eos).
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        stopping_criteria=[_Stop(tokenizer, stop, start)] if stop else None,
        **extra,
    )
    return [_cut(text, stop) for text in _texts(tokenizer, written[:, start:])]


def _texts(tokenizer: Any, ids: Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _cut(text: str, stop: tuple[str, ...]) -> str:
    ends = [at for word in stop if (at := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


class _Stop:
    """Ends a row once its answer (not its prompt) holds a stop text."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # A token holds at least one byte, so the newest stop text lies within so many last tokens; a few more for
        # tokens that hold parts of a character.
        self.window = max(len(word.encode()) for word in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        recent = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        ended = [any(word in text for word in self.stop) for text in _texts(self.tokenizer, recent)]
        return torch.tensor(ended, device=input_ids.device)


def _check_room(model: Any, tokenizer: Any, lengths: Sequence[int], new_tokens: int) -> None:
    """Raise DataError for the first prompt that the model's positions cannot hold together with its answer."""
    positions = longest_row(model, tokenizer)
    if positions is None:
        return
    for index, length in enumerate(lengths):
        # An encoder-decoder counts the two apart.
        needed = max(length, new_tokens) if _task(model) == "seq2seq" else length + new_tokens
        if needed > positions:
            raise DataError(
                f"prompt {index + 1} of {len(lengths)} has {length} tokens; with max_new_tokens={new_tokens} that is "
                f"more than the model's {positions} positions. Shorten the prompt or lower max_new_tokens."
            )
