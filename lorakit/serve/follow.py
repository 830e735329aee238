"""From the engine's threads to asyncio: an answer's tokens as text, piece by piece, and its end."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lorakit.serve.handle import Generated, Handle
from lorakit.serve.work import decoded

REPLACEMENT = "\ufffd"  # what a character whose bytes are not all there decodes to


class _Bell:
    """Wakes a coroutine from other threads; rung many times before it has heard, it is told once."""

    def __init__(self) -> None:
        self._loop, self._event, self._rung = asyncio.get_running_loop(), asyncio.Event(), False

    def ring(self) -> None:
        """In any thread. A second ring that comes between looking and setting tells twice, which does no harm."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop has ended before the request
                self._loop.call_soon_threadsafe(self._event.set)

    async def heard(self) -> None:
        await self._event.wait()
        self._event.clear()
        self._rung = False  # before the caller looks: what comes from here on rings again


async def new_tokens(handle: Handle) -> AsyncGenerator[tuple[int, ...], None]:
    """The tokens that were made since the last time, until the answer ends."""
    bell, seen = _Bell(), 0
    handle.on_news(bell.ring)
    try:
        while True:
            await bell.heard()
            done = handle.done  # before the tokens: none may come between
            made = handle.tokens
            if len(made) > seen:
                yield made[seen:]
                seen = len(made)
            if done:
                return
    finally:
        handle.on_news(None)


async def whole(handle: Handle) -> Generated:
    """The whole answer. Raises what the request failed with; cancels it where the caller is cancelled."""
    bell = _Bell()
    handle.when_done(lambda _: bell.ring())
    try:
        await bell.heard()
    except asyncio.CancelledError:
        handle.cancel()
        raise
    return handle.result(0)


class TextStream:
    """Tokens -> text as it becomes certain: whole characters, and nothing that a stop text may still cut off."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # decoded anew from here; text of the ids before here is in _text
        self._text, self._sent = "", 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain; often of fewer, sometimes of more tokens than these."""
        self._ids += tokens
        before = self._decode(self._ids[self._from : self._read])
        text = self._decode(self._ids[self._from :])
        if len(text) > len(before) and not text.endswith(REPLACEMENT):
            self._text += text[len(before) :]
            self._from, self._read = self._read, len(self._ids)
        return self._send(self._certain())

    def finish(self, text: str) -> str:
        """What of the answer's whole text is not sent yet."""
        sent = self._text[: self._sent]
        rest = text[self._sent :] if text.startswith(sent) else ""
        self._sent = len(self._text)
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self._tokenizer, ids) if ids else ""

    def _certain(self) -> int:
        """How many characters no stop text can take back."""
        ends = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if ends:
            return min(ends)
        held = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(self._text) + 1))
            if self._text.endswith(stop[:length])
        ]
        return len(self._text) - max(held, default=0)

    def _send(self, until: int) -> str:
        fresh = self._text[self._sent : until]
        self._sent = max(self._sent, until)
        return fresh
