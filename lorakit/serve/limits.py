"""What a request may ask for, and how much of the engine it may take."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lorakit.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine. Raises UsageError for a bound that is none."""

    queue: int = 256
    """Requests that may wait or run at once; one more is refused with QueueFullError."""
    running: int = 64
    """Requests of one forward pass."""
    prompt_tokens: int = 8192
    """Tokens of a prompt."""
    new_tokens: int = 4096
    """Tokens that a request may ask for; prompt and answer must fit into the model's own length as well."""
    seconds: float = 600.0
    """Time from the arrival of a request to its last token."""
    step_tokens: int = 512
    """Tokens of one forward pass: long prompts are cut into pieces of at most this many."""
    cache_tokens: int = 16384
    """Tokens of the key-value cache, of all requests together; its memory is taken at the start."""
    page_tokens: int = 256
    """Tokens of one page of it: shared prefixes are found in whole pages."""

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isnan(value):
                raise UsageError(f"Limits.{name} must be a number above 0, not {value!r}.")
            if name != "seconds" and not isinstance(value, int):
                raise UsageError(f"Limits.{name} must be a whole number, not {value!r}.")
        if self.page_tokens < 4:
            raise UsageError(f"Limits.page_tokens must be at least 4, not {self.page_tokens}.")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded; the defaults are greedy. Raises UsageError for values out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 = greedy: the likeliest token, ties to the lower id."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = all."""
    seed: int | None = None
    """Of this request's own random numbers: the answer then does not depend on the requests beside it."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, which holds the token that completes one."""
    ignore_eos: bool = False
    num_beams: int = 1
    """Above 1: beam search; runs on `model.generate`, several requests in one batch."""
    repetition_penalty: float = 1.0
    allowed: Callable[[list[int]], list[int]] | None = None
    """Constrained decoding: from the tokens of the answer so far to the ids that may follow (a grammar's automaton)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1 or self.top_k < 0:
            raise UsageError("max_new_tokens and num_beams must be at least 1, top_k at least 0.")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100) or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature must lie in [0, 100] and top_p in (0, 1], not {self.temperature}, {self.top_p}."
            )
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"repetition_penalty must be above 0, not {self.repetition_penalty}.")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError("stop takes non-empty texts.")
        for text in self.stop:
            if not _has_bytes(text):
                raise UsageError(
                    f"a stop text must be text that UTF-8 can write; {text!a} has half of a surrogate pair. Send it whole."
                )
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError("beams are searched, not sampled: give temperature 0 with num_beams.")

    @property
    def paged(self) -> bool:
        """Whether the continuous batch takes it; else it runs on `model.generate`."""
        return self.num_beams == 1 and self.repetition_penalty == 1.0 and self.allowed is None


def _has_bytes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
