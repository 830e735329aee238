"""What tests of whole runs share: tiny models as folders, small data sets, recipes; a run takes a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = ["red", "green", "blue", "one", "two", "three", "good", "bad", "cat", "dog", "sun", "moon"]


def save_model(folder: Path, build: Callable[..., nn.Module]) -> str:
    """A tiny model with a character-level tokenizer as a transformers folder; returns its path."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    letters = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    engine = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(letters)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    engine.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    logging.disable_progress_bar()
    build(vocab_size=len(letters), pad_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of unequal length with their last word as completion."""
    draw = random.Random(seed)
    rows = [draw.sample(WORDS, draw.randint(1, 5)) for _ in range(count)]
    return [{"prompt": " ".join(row) + " >", "completion": " " + row[-1]} for row in rows]


def label_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    kinds = ("neg", "pos", "so")
    return [{"text": f"{draw.choice(WORDS)} {kinds[i % 3] * 2}", "label": kinds[i % 3]} for i in range(count)]


def score_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"text": draw.choice(WORDS), "label": round(draw.random() * 3, 3) + 0.0001} for _ in range(count)]


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps_of(path: Path) -> list[tuple[Any, ...]]:
    """The rows of a metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "tokens_per_second")
    return [tuple((key, value) for key, value in row.items() if key not in clock) for row in read_rows(path)]
