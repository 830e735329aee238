"""What requests may say, after OpenAI's API: every field is checked, and one that this server does not act on is refused."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lorakit.serve.handle import Generated
from lorakit.serve.limits import SamplingParams

MOST_INPUTS = 2048  # texts of a request for embeddings or classes
MOST_PROMPTS = 64
MOST_STOPS = 16
MOST_PARTS = 1024  # messages of a chat, parts of one
MOST_KEYS = 64  # of one object: each that is unknown is an error of its own

# No list is looked at further than its first error: of a long one, each entry's would be kept.
Ids = Annotated[list[int], Field(fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(max_length=MOST_PROMPTS, fail_fast=True)]
Prompts = Annotated[list[str], Field(max_length=MOST_PROMPTS, fail_fast=True)]
Stops = Annotated[list[str], Field(max_length=MOST_STOPS, fail_fast=True)]
Texts = Annotated[list[str], Field(max_length=MOST_INPUTS, fail_fast=True)]
Pair = Annotated[list[str], Field(max_length=2, fail_fast=True)]
TextsOrPairs = Annotated[list[str | Pair], Field(max_length=MOST_INPUTS, fail_fast=True)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,),
}  # fmt: skip
"""OpenAI's fields that change an answer in ways that this server has not: accepted with the values that change nothing."""
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],), "refusal": ("",)}
"""The same of a message, as clients send back the messages that they were answered."""


def _few(value: Any) -> Any:
    """A mapping of few keys, before any of them is looked at."""
    if isinstance(value, dict) and len(value) > MOST_KEYS:
        raise ValueError(f"expected at most {MOST_KEYS} keys, came {len(value)}")
    return value


class Body(BaseModel):
    """A request's body: an unknown field, a text for a number and NaN are errors. A field that is null is one left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {name: one for name, one in _few(value).items() if one is not None}
        for name, accepted in cls.neutral.items():
            if name in given and not any(_same(given.pop(name), one) for one in accepted):
                raise ValueError(f"{name} is not supported here: leave it out")
        return given


def _same(came: Any, neutral: Any) -> bool:
    """Equal, where 0 is not False: "logprobs": 0 asks for something, false does not."""
    return isinstance(came, bool) == isinstance(neutral, bool) and bool(came == neutral)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL_IN_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Decoding(Body):
    """What both kinds of generation share. Left out, temperature is 0: the likeliest tokens."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_beams: int = Field(1, ge=1, le=16)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    ignore_eos: bool = False
    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _check_stop(self) -> "Decoding":
        if any(not 0 < len(text) <= 256 for text in self.stops()):
            raise ValueError(f"stop takes up to {MOST_STOPS} texts of 1 to 256 characters")
        return self

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def wanted(self) -> int | None:
        """The most tokens of an answer, where the request says it."""
        return self.max_tokens

    def params(self, max_new_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stops(),
            ignore_eos=self.ignore_eos,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
        )


class ChatRequest(Decoding):
    messages: list[Message] = Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)

    def wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Decoding):
    prompt: str | Prompts | Ids | ManyIds

    @model_validator(mode="after")
    def _check_prompts(self) -> "CompletionRequest":
        if not 1 <= len(self.prompts()) <= MOST_PROMPTS or any(not prompt for prompt in self.prompts()):
            raise ValueError(f"prompt takes 1 to {MOST_PROMPTS} texts or lists of ids, none of them empty")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class EmbeddingRequest(Body):
    model: str = Field(max_length=256)
    input: str | Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _refuse_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            raise ValueError(
                "expected a text or a list of texts, came token ids, and those of another tokenizer would mean another text: "
                "send the texts (langchain_openai: check_embedding_ctx_length=False)"
            )
        return value

    @model_validator(mode="after")
    def _check_inputs(self) -> "EmbeddingRequest":
        if not 1 <= len(self.inputs()) <= MOST_INPUTS or not all(self.inputs()):
            raise ValueError(f"input takes 1 to {MOST_INPUTS} texts, none of them empty")
        return self

    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class ClassifyRequest(Body):
    model: str = Field(max_length=256)
    input: str | TextsOrPairs

    @model_validator(mode="after")
    def _check_inputs(self) -> "ClassifyRequest":
        rows = [self.input] if isinstance(self.input, str) else self.input
        if not 1 <= len(rows) <= MOST_INPUTS or any(
            not row or (not isinstance(row, str) and len(row) != 2) for row in rows
        ):
            raise ValueError(f"input takes 1 to {MOST_INPUTS} texts or pairs of texts, none of them empty")
        return self

    def inputs(self) -> list[str | tuple[str, str]]:
        rows = [self.input] if isinstance(self.input, str) else self.input
        return [row if isinstance(row, str) else (row[0], row[1]) for row in rows]


class PublishRequest(Body):
    name: str
    folder: str | None = None


class VersionRequest(Body):
    version: str | None = None


class AliasRequest(Body):
    target: str


# -- answers


@dataclass(frozen=True)
class Writer:
    """Writes the answers of one request. chat: whether it is one; model: as asked for; adapter: the hash that answers."""

    chat: bool
    model: str
    adapter: str | None
    id: str
    created: int

    @classmethod
    def of(cls, request: Decoding, adapter: str | None) -> "Writer":
        chat = isinstance(request, ChatRequest)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(chat, request.model, adapter, name, int(time.time()))

    def whole(self, answers: Sequence[Generated]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(kind), "choices": choices, "usage": usage(answers)}

    def begin(self) -> dict[str, Any]:
        """A chat's first event."""
        return self._event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def piece(self, text: str) -> dict[str, Any]:
        return self._event([self._part(text, None)])

    def end(self, answer: Generated) -> dict[str, Any]:
        return self._event([self._part("", answer.finish)])

    def counts(self, answer: Generated) -> dict[str, Any]:
        return {**self._event([]), "usage": usage([answer])}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}

    def _part(self, text: str, finish: str | None) -> dict[str, Any]:
        said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _choice(self, index: int, answer: Generated) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
        return {"index": index, **said, "logprobs": None, "finish_reason": answer.finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "adapter": self.adapter}


def usage(answers: Sequence[Generated]) -> dict[str, int]:
    prompt, new = sum(one.prompt_tokens for one in answers), sum(len(one.tokens) for one in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
