"""What the engine keeps of a running request, and how its tokens become an answer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.serve.bank import Version
from lorakit.serve.handle import Finish, Handle
from lorakit.serve.limits import SamplingParams


@dataclass(eq=False)
class Work:
    """One request. deadline: by time.monotonic(); ends: ids that end its answer; given: how many tokens its caller has;
    handed: whether the continuous batch has it."""

    id: str
    prompt: list[int]
    version: Version | None
    params: SamplingParams
    handle: Handle
    deadline: float
    ends: frozenset[int]
    given: int = 0
    handed: bool = False
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.params.temperature > 0:
            self.generator = torch.Generator()
            if self.params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.params.seed)

    @property
    def adapter(self) -> int:
        """The number of its adapter in a plan; -1 = the base."""
        return -1 if self.version is None else self.version.id

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


def take_tokens(work: Work, tokens: list[int], tokenizer: Any) -> bool:
    """Hand what is new of an answer's tokens to its caller; True where one of its stop texts is complete."""
    kept = [token for token in tokens[work.given :] if token not in work.ends]
    for token in kept:
        work.given += 1
        work.handle.push([token])
        if work.params.stop and stop_found(tokenizer, work.handle.tokens, work.params.stop):
            return True
    return False


def decoded(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens as they are, as lorakit.generate has it: a tokenizer's tidying of spaces would make it depend on
    what comes later. special: with the special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def stop_found(tokenizer: Any, tokens: tuple[int, ...] | list[int], stop: tuple[str, ...]) -> bool:
    """Whether the end of an answer holds a stop text. A token is at least a byte of text, so a tail is enough to look at."""
    tail = max(len(text.encode()) for text in stop) + 4
    text = decoded(tokenizer, tokens[-tail:], special=True)
    return any(one in text for one in stop)


def conclude(work: Work, finish: Finish, tokenizer: Any) -> None:
    """End the request with the tokens that its caller was given."""
    tokens = work.handle.tokens
    text = decoded(tokenizer, tokens)
    cuts = [text.find(one) for one in work.params.stop]
    cut = min((place for place in cuts if place >= 0), default=len(text))
    work.handle.finish(tokens, text[:cut], finish)
