"""What requests may say, after OpenAI's API: every field is checked, and one that this server does not act on is refused."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorakit.serve.handle import Generated
from lorakit.serve.limits import SamplingParams

MOST_INPUTS = 2048  # texts of a request for embeddings or classes
MOST_PROMPTS = 64
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,),
}  # fmt: skip
"""OpenAI's fields that change an answer in ways that this server has not: accepted with the values that change nothing."""


class Body(BaseModel):
    """A request's body: an unknown field, a text for a number and NaN are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Decoding(Body):
    """What both kinds of generation share. Left out, temperature is 0: the likeliest tokens."""

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_beams: int = Field(1, ge=1, le=16)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, accepted in NEUTRAL.items():
            if name in value and value[name] is not None and value[name] not in accepted:
                raise ValueError(f"{name} is not supported here: leave it out")
        return {name: one for name, one in value.items() if name not in NEUTRAL}

    @model_validator(mode="after")
    def _check_stop(self) -> "Decoding":
        texts = self.stops()
        if len(texts) > 16 or any(not 0 < len(text) <= 256 for text in texts):
            raise ValueError("stop takes up to 16 texts of 1 to 256 characters")
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
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)

    def wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Decoding):
    prompt: str | list[str] | list[int] | list[list[int]]

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
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @model_validator(mode="after")
    def _check_inputs(self) -> "EmbeddingRequest":
        if not 1 <= len(self.inputs()) <= MOST_INPUTS or not all(self.inputs()):
            raise ValueError(f"input takes 1 to {MOST_INPUTS} texts, none of them empty")
        return self

    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class ClassifyRequest(Body):
    model: str = Field(max_length=256)
    input: str | list[str | list[str]]

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
