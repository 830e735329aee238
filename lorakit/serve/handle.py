"""A request as its caller holds it: tokens as they come, the whole result, cancellation. Safe in any thread."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.errors import LorakitError, ServeError

LOG = logging.getLogger("lorakit.serve")

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generated:
    """What a request gave. tokens: the answer's, a final end-of-sequence token left out; text: without special tokens
    and cut before a stop text; finish: "stop" (end of sequence, stop text), "length" or "cancelled"; adapter: hash of the
    adapter that answered, None for the base."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
    prompt_tokens: int
    adapter: str | None
    seconds: float


class Handle:
    """One running request: iterate it for its tokens, call `result` for the whole, `cancel` to stop it."""

    def __init__(self, prompt_tokens: int, adapter: str | None, cancel: Callable[["Handle"], None]) -> None:
        self.adapter = adapter
        self.prompt_tokens = prompt_tokens
        self.arrived = time.monotonic()
        self.work: Any = None  # the engine's own record of it
        self._cancel = cancel
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._news: Callable[[], None] | None = None
        self._outcome: Future[Generated] = Future()

    def __iter__(self) -> Iterator[int]:
        """The answer's tokens as they are made. Raises what the request failed with."""
        given = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._tokens) > given or self._outcome.done())  # noqa: B023
                fresh = self._tokens[given:]
                done = self._outcome.done()
            yield from fresh
            given += len(fresh)
            if done and not fresh:
                self._outcome.result()
                return

    def result(self, timeout: float | None = None) -> Generated:
        """The whole answer. Raises what the request failed with, TimeoutError after `timeout` seconds (it goes on)."""
        return self._outcome.result(timeout)

    def cancel(self) -> None:
        """Stop the request and free what it holds; its result has finish "cancelled". Nothing happens if it is done."""
        if not self.done:
            self._cancel(self)

    @property
    def done(self) -> bool:
        return self._outcome.done()

    @property
    def waited(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those made so far."""
        with self._changed:
            return tuple(self._tokens)

    def when_done(self, call: Callable[["Handle"], None]) -> None:
        """Have `call` called, in whatever thread ends the request (at once where it has ended)."""
        self._outcome.add_done_callback(lambda _: call(self))

    def on_news(self, call: Callable[[], None] | None) -> None:
        """Have `call` called when there are tokens, and at the end, in whatever thread makes them; at once where there
        are some already. One listener at a time: None takes it away. It must be short; one that raises is heard no more."""
        with self._changed:
            self._news = call
            told = bool(self._tokens) or self.done
        if call is not None and told:
            call()

    # -- the engine's side -------------------------------------------------------------------------------------------

    def push(self, tokens: list[int]) -> None:
        """Hand over tokens that were made."""
        with self._changed:
            self._tokens.extend(tokens)
        self._tell()

    def finish(self, tokens: tuple[int, ...], text: str, finish: Finish) -> None:
        """End the request. The first end counts."""
        seconds = time.monotonic() - self.arrived
        self._end(Generated(tokens, text, finish, self.prompt_tokens, self.adapter, seconds))

    def fail(self, error: LorakitError) -> None:
        """End the request with an error. The first end counts."""
        self._end(error)

    def crash(self, error: BaseException) -> None:
        """End the request after a fault that no one foresaw."""
        self.fail(error if isinstance(error, LorakitError) else ServeError(f"the engine failed: {error!r}"))

    def _end(self, outcome: Generated | LorakitError) -> None:
        with self._changed:
            if self._outcome.done():
                return
        try:
            if isinstance(outcome, Generated):
                self._outcome.set_result(outcome)
            else:
                self._outcome.set_exception(outcome)
        except Exception:  # another thread ended it first (InvalidStateError)
            return
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            call = self._news
        if call is None:
            return
        try:
            call()
        except Exception:  # of an event loop that is closed, say: the thread that tells computes for others too
            LOG.exception("a listener failed, and is told nothing more")
            with self._changed:
                self._news = None if self._news == call else self._news
