"""The routes that answer for models: from a checked request to the engine and back."""

import asyncio
import base64
import json
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError, UnknownAdapterError, UsageError
from lorakit.serve.follow import TextStream, new_tokens, whole
from lorakit.serve.handle import Generated, Handle
from lorakit.serve.metrics import Metrics
from lorakit.serve.openai import ChatRequest, ClassifyRequest, CompletionRequest, Decoding, EmbeddingRequest, Writer
from lorakit.serve.problems import problem_of
from lorakit.serve.server import Server, Started

if TYPE_CHECKING:
    from lorakit.serve.classify import Classified, Embedded

HEADER = "X-Lorakit-Adapter"
GONE = 499  # the client left before its answer


class Answers:
    """One server's answering routes. What blocks (the tokenizer, a read from disk, a batch of texts) runs in threads."""

    def __init__(self, server: Server, metrics: Metrics) -> None:
        self._server, self._metrics = server, metrics
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="lorakit-http")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def generate(self, body: ChatRequest | CompletionRequest, request: Any) -> Any:
        """A whole answer, or a stream of it."""
        from starlette.responses import JSONResponse, Response

        self._server.engine.check_kind("generation")
        if body.stream:
            started = await self._start(body, _prompts(body))
            headers = {HEADER: _shown(started[0].hash), "Cache-Control": "no-store"}
            return _streamed(self._stream(body, started), started[0].handle, headers)
        started = await self._start(body, _prompts(body))
        answers = await self._unless_gone(request, self._results(started))
        if answers is None:
            return Response(status_code=GONE)
        self._count(body, started[0], answers)
        return JSONResponse(Writer.of(body, started[0].hash).whole(answers), headers={HEADER: _shown(started[0].hash)})

    async def embed(self, body: EmbeddingRequest, request: Any) -> Any:
        def entry(index: int, one: "Embedded") -> dict[str, Any]:
            return {"object": "embedding", "index": index, "embedding": _vector(body, one)}

        self._server.engine.check_kind("embedding")
        return await self._texts(body, request, "embeddings", self._server.engine.embed, entry)

    async def classify(self, body: ClassifyRequest, request: Any) -> Any:
        def entry(index: int, one: "Classified") -> dict[str, Any]:
            return {"index": index, "label": one.label, "scores": one.scores}

        self._server.engine.check_kind("classification")
        return await self._texts(body, request, "classify", self._server.engine.classify, entry)

    def models(self) -> list[dict[str, Any]]:
        """The base, every name in service and every alias of one."""
        base = self._server.model_name
        found = [{"id": base, "object": "model", "created": 0, "owned_by": "lorakit", "root": base, "parent": None,
                  "adapter": None}]  # fmt: skip
        for name, release, created in self._server.in_service():
            found.append(
                {"id": name, "object": "model", "created": int(created), "owned_by": "lorakit", "root": release.name,
                 "parent": base, "adapter": release.hash}
            )  # fmt: skip
        return found

    def model(self, name: str) -> dict[str, Any]:
        """One of them. Raises UnknownAdapterError."""
        found = next((one for one in self.models() if one["id"] == name), None)
        if found is None:
            self._server.registry.resolve(name)  # "name@hash" is answered for, but not listed
            raise UnknownAdapterError("this version is in service, but only names are listed: ask for its name.")
        return found

    # -- generation

    async def _start(self, body: Decoding, prompts: Sequence[Any]) -> list[Started]:
        """Begin to answer every prompt, by the version that the first one got, or none."""
        started: list[Started] = []
        try:
            for index, prompt in enumerate(prompts):
                begin = partial(self._begin, body, prompt, index, started[0].reference if started else body.model)
                # shielded: a request that begins while its client leaves must not be left running
                started.append(await self._shielded(begin))
        except BaseException:
            for one in started:
                one.handle.cancel()
            raise
        return started

    async def _shielded(self, begin: Callable[[], Started]) -> Started:
        future = asyncio.get_running_loop().run_in_executor(self._threads, begin)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel_late)
            raise

    def _begin(self, body: Decoding, prompt: Any, index: int, reference: str | None) -> Started:
        ids = self._server.encode(prompt, index)
        params = body.params(body.wanted() or self._server.room(len(ids)))
        return self._server.begin(ids, reference, params, wait=False)

    async def _results(self, started: Sequence[Started]) -> list[Generated]:
        try:
            return [await whole(one.handle) for one in started]
        finally:
            for one in started:
                one.handle.cancel()  # nothing where it is done

    async def _stream(self, body: Decoding, started: Sequence[Started]) -> AsyncIterator[bytes]:
        """The events of a streamed answer. Ended early (the client left), it cancels the request."""
        (one,) = started
        writer, began = Writer.of(body, one.hash), time.monotonic()
        text, first = TextStream(self._server.tokenizer, body.stops()), True
        try:
            if writer.chat:
                yield _event(writer.begin())
            if body.num_beams == 1:  # beams are known when all is
                async with aclosing(new_tokens(one.handle)) as made:
                    async for tokens in made:
                        if piece := text.push(tokens):
                            if first:
                                self._metrics.first_text(time.monotonic() - began)
                                first = False
                            yield _event(writer.piece(piece))
            answer = await whole(one.handle)
            if rest := text.finish(answer.text):
                yield _event(writer.piece(rest))
            self._count(body, one, [answer])
            yield _event(writer.end(answer))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield _event(writer.counts(answer))
            yield b"data: [DONE]\n\n"
        except LorakitError as error:  # the status has been sent
            yield _event(problem_of(error).body())
        finally:
            one.handle.cancel()

    def _count(self, body: Decoding, one: Started, answers: Sequence[Generated]) -> None:
        self._metrics.answered(
            one.name,
            "chat" if isinstance(body, ChatRequest) else "completions",
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            new_tokens=sum(len(answer.tokens) for answer in answers),
            requests=len(answers),
        )

    async def _unless_gone(self, request: Any, work: Any) -> Any:
        """What `work` gives; None, and `work` cancelled, where the client leaves first."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    # -- texts

    async def _texts(
        self, body: EmbeddingRequest | ClassifyRequest, request: Any, route: str, call: Any, entry: Any
    ) -> Any:
        """The answer to texts, all of one version of the adapter. Where the client leaves, no more of them are begun."""
        from starlette.responses import JSONResponse, Response

        texts, gone = body.inputs(), threading.Event()

        def unless_gone(rows: list[Any], version: Any) -> Any:
            if gone.is_set():
                raise CancelledError  # nobody is there to hear of it
            return call(rows, version)

        work = partial(self._server.answer_rows, texts, body.model, unless_gone, wait=False)
        try:
            done = await self._unless_gone(request, asyncio.get_running_loop().run_in_executor(self._threads, work))
        finally:
            gone.set()
        if done is None:
            return Response(status_code=GONE)
        name, rows = done
        tokens, adapter = sum(row.tokens for row in rows), rows[0].adapter
        self._metrics.answered(name, route, prompt_tokens=tokens, new_tokens=0, requests=len(texts))
        content = {
            "object": "list",
            "model": body.model,
            "adapter": adapter,
            "data": [entry(index, one) for index, one in enumerate(rows)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return JSONResponse(content, headers={HEADER: _shown(adapter)})


def _prompts(body: ChatRequest | CompletionRequest) -> list[Any]:
    if isinstance(body, ChatRequest):
        return [[message.turn() for message in body.messages]]
    prompts = body.prompts()
    if body.stream and len(prompts) > 1:
        raise UsageError("a stream answers one prompt: send one, or leave stream out.")
    return list(prompts)


def _streamed(events: AsyncIterator[bytes], handle: Handle, headers: dict[str, str]) -> Any:
    """A response of server-sent events; its request is cancelled where the client leaves, even before the first event."""
    from starlette.responses import StreamingResponse

    class Streamed(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                handle.cancel()

    return Streamed(events, media_type="text/event-stream", headers=headers)


def _cancel_late(future: "asyncio.Future[Started]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().handle.cancel()


async def _left(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _shown(adapter: str | None) -> str:
    return adapter or "base"


def _vector(body: EmbeddingRequest, one: "Embedded") -> list[float] | str:
    if body.encoding_format == "float":
        return list(one.vector)
    return base64.b64encode(struct.pack(f"<{len(one.vector)}f", *one.vector)).decode()
