"""The admin routes: which adapters there are, and which of them answer. Behind a key of their own (see guard)."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lorakit.errors import UnknownAdapterError, UsageError
from lorakit.serve.names import shown
from lorakit.serve.openai import AliasRequest, PublishRequest, VersionRequest
from lorakit.serve.server import Server


def add_admin(app: Any, server: Server) -> None:
    """Put the routes on a FastAPI app. Each runs in a thread: it reads files, and may wait for a load."""

    async def done(call: Callable[..., Any], name: str, *more: Any) -> dict[str, Any]:
        await asyncio.to_thread(call, name, *more)
        return await asyncio.to_thread(_one, server, name)

    @app.get("/v1/adapters")
    async def adapters() -> dict[str, Any]:
        rows = await asyncio.to_thread(server.adapters)
        return {"object": "list", "data": [asdict(row) for row in rows], "refused": server.registry.refused}

    @app.get("/v1/adapters/{name}")
    async def adapter(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(_with_history, server, name)

    @app.post("/v1/adapters", status_code=201)
    async def publish(body: PublishRequest) -> dict[str, Any]:
        """Publish the folder `folder` (default: of the adapter's own name) that lies in the registry's folder."""
        return await done(server.publish_loose, body.name, body.name if body.folder is None else body.folder)

    @app.post("/v1/adapters/{name}/rollback")
    async def roll_back(name: str, body: VersionRequest | None = None) -> dict[str, Any]:
        return await done(server.roll_back, name, None if body is None else body.version)

    @app.post("/v1/adapters/{name}/{action}")
    async def act(name: str, action: str) -> dict[str, Any]:
        calls: dict[str, tuple[Any, ...]] = {
            "load": (server.load,), "unload": (server.unload,), "pin": (server.pin,), "unpin": (server.pin, False),
        }  # fmt: skip
        if action not in calls:
            raise UsageError(f"there is no action {shown(action)}; there are load, unload, pin, unpin and rollback.")
        call, *more = calls[action]
        return await done(call, name, *more)

    @app.get("/v1/aliases")
    async def aliases() -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(server.registry.aliases)}

    @app.put("/v1/aliases/{alias}")
    async def set_alias(alias: str, body: AliasRequest) -> dict[str, Any]:
        return {"alias": alias, "target": await asyncio.to_thread(server.alias, alias, body.target)}

    @app.delete("/v1/aliases/{alias}")
    async def drop_alias(alias: str) -> dict[str, Any]:
        await asyncio.to_thread(server.drop_alias, alias)
        return {"alias": alias, "deleted": True}


def _one(server: Server, name: str) -> dict[str, Any]:
    found = next((row for row in server.adapters() if row.name == name), None)
    if found is None:
        raise UnknownAdapterError(f"there is no adapter {shown(name)} in the registry.")
    return asdict(found)


def _with_history(server: Server, name: str) -> dict[str, Any]:
    found, entry = _one(server, name), server.registry.entries().get(name)
    return {**found, "history": [] if entry is None else [asdict(event) for event in entry.history]}
