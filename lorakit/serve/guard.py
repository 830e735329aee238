"""What stands before every route: keys, the host's name, the size and the pace of bodies, the pace of readers. Plain ASGI."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.serve.keys import Keys, is_loopback
from lorakit.serve.problems import Problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")
ADMIN = ("/v1/adapters", "/v1/aliases")
METRICS = "/metrics"
log = logging.getLogger("lorakit.serve")


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much of the server a connection may hold."""

    api: Keys = field(default_factory=Keys)
    """None: anyone who reaches the server, which then answers to this machine's own names only."""
    admin: Keys = field(default_factory=Keys)
    """None: the admin routes are closed."""
    body_bytes: int = 4 << 20
    """Of a request's body."""
    body_seconds: float = 20.0
    """In which a body must have come."""
    send_seconds: float = 30.0
    """In which a client must take a piece of its answer."""


class TooSlowError(Exception):
    """A client does not read its answer."""


class Guard:
    """Wraps an ASGI app. note: called with (route, status, seconds) after each answer."""

    def __init__(self, app: App, access: Access, note: Callable[[str, int, float], None]) -> None:
        self._app, self._access, self._note = app, access, note

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        began, status = time.monotonic(), 0

        async def paced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            try:
                async with asyncio.timeout(self._access.send_seconds):
                    await send(message)
            except TimeoutError as error:
                raise TooSlowError from error

        try:
            await self._admit(scope, receive, paced)
        except TooSlowError:
            log.warning("a client stopped reading its answer; its request is cancelled")
        finally:
            route = scope.get("route")  # set by the router where one matched: a bound on the labels
            self._note(getattr(route, "path", "(none)"), status, time.monotonic() - began)

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> None:
        problem = self._refusal(scope)
        body = b""
        if problem is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            read = await self._body(scope, receive)
            if read is None:
                return
            problem, body = (read, b"") if isinstance(read, Problem) else (None, read)
        if problem is not None:
            return await refuse(send, problem)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # nothing but the client's leaving is still to come
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _refusal(self, scope: Message) -> Problem | None:
        path, access = str(scope["path"]), self._access
        if not access.api and not is_loopback(_host(_header(scope, b"host") or "")):
            return Problem(403, "wrong_host", "without keys this server answers to localhost only.")  # DNS rebinding
        if path in OPEN:
            return None
        if any(path == prefix or path.startswith(f"{prefix}/") for prefix in ADMIN):
            if not access.admin:
                return Problem(403, "admin_closed", "the admin routes are closed: start the server with an admin key.")
            return None if access.admin.match(_bearer(scope)) else _unauthorised("an admin key")
        if not access.api:
            return None
        key = _bearer(scope)
        known = access.api.match(key)
        if path == METRICS:
            known |= access.admin.match(key)
        return None if known else _unauthorised("an API key")

    async def _body(self, scope: Message, receive: Receive) -> bytes | Problem | None:
        """The whole body, what is wrong with it, or None where the client has left."""
        access = self._access
        claimed = _header(scope, b"content-length")
        limit = Problem(
            413, "body_too_large", f"the body has more than the {access.body_bytes:,} bytes that are taken."
        )
        parts, size = [], 0
        try:
            async with asyncio.timeout(access.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    # Some of what is too much is read and dropped: a client that is still writing would not read the answer.
                    if size > 4 * access.body_bytes or _over(claimed, 4 * access.body_bytes):
                        return limit
                    if size <= access.body_bytes:
                        parts.append(part)
                    else:
                        parts.clear()
                    if not message.get("more_body", False):
                        return limit if size > access.body_bytes else b"".join(parts)
        except TimeoutError:
            return Problem(408, "body_too_slow", f"the body did not come within {access.body_seconds:g} seconds.")


async def refuse(send: Send, problem: Problem) -> None:
    """Answer with a problem, and have the connection closed: what is left of the body is not read."""
    body = json.dumps(problem.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers | dict(problem.headers)).items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _unauthorised(what: str) -> Problem:
    message = f"expected {what}: Authorization: Bearer <key>."
    return Problem(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


def _header(scope: Message, name: bytes) -> str | None:
    """A header's value; None where it is missing, or given more than once (which of them holds?)."""
    found = [value for key, value in scope["headers"] if key.lower() == name]
    return found[0].decode("latin-1") if len(found) == 1 else None


def _bearer(scope: Message) -> str:
    scheme, _, key = (_header(scope, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _host(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]


def _over(claimed: str | None, most: int) -> bool:
    return claimed is not None and (not claimed.isdigit() or len(claimed) > 18 or int(claimed) > most)
