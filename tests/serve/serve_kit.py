"""What the tests of serving share: tiny bases with a tokenizer, adapters on disk, and each one's own greedy answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from adapting import grow
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import PreTrainedTokenizerFast

import lorakit as lk

TIE = 1e-4
BASES = {
    "llama": lambda: tiny.llama(max_position_embeddings=128, vocab_size=258),
    "gpt2": lambda: tiny.gpt2(n_positions=128, vocab_size=258),
}


def tokenizer() -> Any:
    """One id a character: 0 pads, 2 ends."""
    letters = ["\n", *map(chr, range(32, 127)), *map(chr, range(0xC0, 0xC0 + 159))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>")


def saved(kind: str, folder: Path, seed: int = 0, std: float = 0.3, base: Any = None, **fields: Any) -> Path:
    """An adapter of random values for a base of `kind`, on disk."""
    model = (base or BASES[kind])()
    method = lk.LoRA(**({"r": 4, "alpha": 8, "target_modules": "all-linear"} | fields))
    lk.attach(model, method, name="a", seed=seed)
    grow(model, "a", seed, std)
    return lk.save(model, folder, name="a")


class Alone:
    """The reference: one adapter at a time on a plain model, a whole forward for every token (no cache, no batch)."""

    def __init__(self, kind: str, folders: dict[str, Path]) -> None:
        self.model: nn.Module = BASES[kind]()
        for name, folder in folders.items():
            lk.load(self.model, folder, name=name)
        self.ties = 0

    def check(self, prompt: list[int], name: str | None, tokens: tuple[int, ...], new: int, ends: set[int]) -> None:
        """Raise where `tokens` is not the greedy answer. A tie between two logits may fall either way, and is counted."""
        with lk.use(self.model, name), torch.no_grad():
            ids = torch.tensor([[*prompt, *tokens]])
            logits = self.model(ids).logits[0, len(prompt) - 1 :]  # (answer + 1, vocabulary)
        for place, token in enumerate(tokens):
            self._same(logits[place], token, place)
        if len(tokens) < new:
            best = int(logits[len(tokens)].argmax())
            assert best in ends, f"ended after {len(tokens)} tokens, and {best} would follow"

    def _same(self, logits: torch.Tensor, token: int, place: int) -> None:
        best = int(logits.argmax())
        if best == token:
            return
        gap = float(logits[best] - logits[token])
        assert gap < TIE, f"token {place}: {token} in place of {best}, {gap} apart"
        self.ties += 1
