"""Errors as HTTP answers, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import (
    AdapterLoadingError,
    DataError,
    FileError,
    LorakitError,
    NotFiniteError,
    OutputError,
    QueueFullError,
    ServeError,
    TimedOutError,
    TooLongError,
    UnknownAdapterError,
    UsageError,
    WrongKindError,
)

REQUEST, SERVER = "invalid_request_error", "server_error"


@dataclass(frozen=True)
class Problem:
    """An answer that says what is wrong. code: short, for programs; param: the field that it is about."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = SERVER if self.status >= 500 else "rate_limit_error" if self.status == 429 else REQUEST
        if self.status in (401, 403):
            kind = "authentication_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS: tuple[tuple[type[LorakitError], int, str], ...] = (
    (UnknownAdapterError, 404, "model_not_found"),
    (AdapterLoadingError, 503, "adapter_loading"),
    (QueueFullError, 429, "queue_full"),
    (TooLongError, 400, "context_length_exceeded"),
    (TimedOutError, 504, "timed_out"),
    (WrongKindError, 400, "wrong_kind"),
    (NotFiniteError, 500, "not_finite"),
    (ServeError, 500, "engine_failed"),
    (FileError, 400, "adapter_refused"),
    (DataError, 400, "invalid_input"),
    (OutputError, 507, "cannot_write"),
    (UsageError, 400, "invalid_value"),
)


def problem_of(error: LorakitError, *, admin: bool = False) -> Problem:
    """How an error is answered. admin: the caller may read about files; others are only told that there is a fault."""
    status, code = next(((status, code) for kind, status, code in KINDS if isinstance(error, kind)), (500, "failed"))
    if isinstance(error, FileError) and not admin:
        return Problem(
            404, code, "this adapter was refused when it was loaded: its files do not fit this base.", "model"
        )
    told = admin or status < 500 or status in (503, 504) or isinstance(error, NotFiniteError)
    message = str(error) if told else "the request failed in the engine."
    headers = {}
    if isinstance(error, AdapterLoadingError | QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Problem(status, code, message, "model" if isinstance(error, UnknownAdapterError) else None, headers)


def malformed(faults: Sequence[Mapping[str, Any]]) -> Problem:
    """What pydantic found wrong with a body. Of what was sent, nothing but field names is said again."""
    where = [".".join(ascii(part).strip("'")[:60] for part in fault.get("loc", ())[1:7]) for fault in faults]
    what = [str(fault.get("msg", "")).removeprefix("Value error, ") for fault in faults]
    said = [f"{place}: {one}" if place else one for place, one in zip(where, what, strict=True)]
    more = f" (and {len(said) - 5} more)" if len(said) > 5 else ""
    return Problem(400, "invalid_body", "; ".join(said[:5]) + more, where[0] if where and where[0] else None)
