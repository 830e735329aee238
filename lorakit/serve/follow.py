"""From the engine's threads to asyncio: an answer's tokens as text, piece by piece, and its end."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lorakit.serve.handle import Generated, Handle

TICK = 0.01  # seconds between looks at the tokens of all streams
REPLACEMENT = "\ufffd"  # what a character whose bytes are not all there decodes to


class Follower:
    """Follows handles: one task looks at all of them, so that a stream costs nothing while it waits."""

    def __init__(self) -> None:
        self._streams: dict[Handle, tuple[int, asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None

    async def tokens(self, handle: Handle) -> AsyncGenerator[tuple[int, ...], None]:
        """The tokens that were made since the last time, until the answer ends."""
        event, seen = asyncio.Event(), 0
        _when_done(handle, event.set)
        self._streams[handle] = (0, event)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look())
        try:
            while True:
                await event.wait()
                event.clear()
                done = handle.done  # before the tokens: none may come between
                made = handle.tokens
                if len(made) > seen:
                    yield made[seen:]
                    seen = len(made)
                if done:
                    return
        finally:
            self._streams.pop(handle, None)

    async def result(self, handle: Handle) -> Generated:
        """The whole answer. Raises what the request failed with; cancels it where the caller is cancelled."""
        event = asyncio.Event()
        _when_done(handle, event.set)
        try:
            await event.wait()
        except asyncio.CancelledError:
            handle.cancel()
            raise
        return handle.result(0)

    async def _look(self) -> None:
        while self._streams:
            for handle, (seen, event) in list(self._streams.items()):
                made = len(handle.tokens)
                if made > seen and handle in self._streams:
                    self._streams[handle] = (made, event)
                    event.set()
            await asyncio.sleep(TICK)


def _when_done(handle: Handle, call: Any) -> None:
    loop = asyncio.get_running_loop()

    def tell(_: Handle) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the request
            loop.call_soon_threadsafe(call)

    handle.when_done(tell)


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
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

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
