"""The process that listens: uvicorn, with time for headers bounded, and an orderly end."""

import asyncio
import logging
import signal
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lorakit.errors import UsageError
from lorakit.serve.app import build_app
from lorakit.serve.guard import Access
from lorakit.serve.keys import check_start
from lorakit.serve.server import Server

log = logging.getLogger("lorakit.serve")
BACKLOG = 2048  # connections that wait to be taken: uvicorn's own
TAKEN = 16 << 10  # bytes that a client must take in `linger_seconds`


@dataclass(frozen=True)
class ListenConfig:
    """Where to listen, and how much connections may take."""

    host: str = "127.0.0.1"
    """The address to listen on; beyond this machine only with a key."""
    port: int = 8000
    """0 = any that is free."""
    connections: int = 512
    """At once; one more is answered 503."""
    header_seconds: float = 10.0
    """In which a request's headers must have come."""
    keep_alive_seconds: float = 75.0
    """For which a connection without a request is kept. Longer than clients keep theirs (httpx and openai 5, aiohttp 15):
    where the server is the first to close, it may do so under a request that is on its way, which is then lost."""
    linger_seconds: float = 10.0
    """A connection that is closed here, and whose client takes less than 16 KiB of what is left in this time, is cut."""
    drain_seconds: float = 30.0
    """For requests that run when the server is told to stop."""


def listen(server: Server, access: Access, config: ListenConfig, *, began: Any = None) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests end. Call it in the main thread.

    began: called with the port, once connections are taken. Raises UsageError where the address cannot be listened on, or
    reaches beyond this machine without a key.
    """
    import uvicorn

    check_start(config.host, access.api, access.admin)
    sockets = [_bound(config)]
    settings = uvicorn_settings(build_app(server, access), config)
    if began is not None:
        began(sockets[0].getsockname()[1])
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn takes the signals while it runs, and raises them again at its end: ignored by then, they end nothing twice
        uvicorn.Server(settings).run(sockets=sockets)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sockets[0].close()


def uvicorn_settings(app: Any, config: ListenConfig) -> Any:
    """What uvicorn is told, as its Config."""
    import uvicorn

    return uvicorn.Config(
        app,
        http=_protocol(config.header_seconds, config.linger_seconds),
        ws="none",
        limit_concurrency=config.connections,
        timeout_keep_alive=max(1, round(config.keep_alive_seconds)),
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody's word is taken for where a request comes from
        log_config=None,
    )


def _bound(config: ListenConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        with ExitStack() as undone:
            found = undone.enter_context(socket.socket(family))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((config.host, config.port))
            found.listen(BACKLOG)  # a client that comes before uvicorn does waits: `began` has told it the port
            undone.pop_all()
            return found
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {config.host}, port {config.port}: {error}.") from error


def _protocol(seconds: float, linger: float) -> Any:
    """uvicorn's protocol, which waits for ever for a request's headers and for a client to take the rest, with ends to that."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Timed(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin()
            self._look(None)

        def data_received(self, data: bytes) -> None:
            if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
                self._begin()  # the next request on a connection that is kept
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._end()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            if self._watch is not None:
                self._watch.cancel()
            super().connection_lost(exc)

        def _begin(self) -> None:
            self._deadline = self.loop.call_later(seconds, self.transport.close)

        def _end(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _look(self, left: int | None) -> None:
            """Now and then: `close` waits until the client has taken what is written, which one that does not read never has.

            left: bytes that waited at the last look, where it was closed by then.
            """
            if self.transport.is_closing():
                now = self.transport.get_write_buffer_size()
                if left is not None and left - now < TAKEN:
                    log.warning("a client does not take the end of its answer; its connection is cut")
                    self.transport.abort()
                    return
                left = now
            self._watch = self.loop.call_later(linger, self._look, left)

    return Timed
