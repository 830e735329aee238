"""64 clients at once, some of which leave; bodies that are malformed, huge and slow: nothing is lost, stuck or leaked."""

import asyncio
import gc
import json
import random
import resource
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import serve_app_kit as kit
from serve_app_kit import API_KEY, expected, grown, idle, listening, until

from lorakit.serve.limits import Limits
from lorakit.serve.server import ServerConfig

pytestmark = pytest.mark.long
CLIENTS, SECONDS, TOKENS = 64, 60.0, 24
NAMES = ("base", "a", "b", "c", "d")
HEADERS = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def threads() -> set[str]:
    """The threads of this process, those of the pools aside that grow to their bound as they are used."""
    pools = ("lorakit-http", "asyncio", "lorakit-load", "ThreadPoolExecutor")
    return {f"{one.name} {one.ident}" for one in threading.enumerate() if not one.name.startswith(pools)}


async def _client(url, draw, until_, wanted, tally):
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60) as client:
        await _ask(client, draw, until_, wanted, tally)


async def _ask(client, draw, until_, wanted, tally):
    while time.monotonic() < until_:
        name, leaves = draw.choice(NAMES), draw.random() < 0.2
        body = {"model": name, "prompt": "one two", "max_tokens": TOKENS, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code in (429, 503):
                tally["full"] += 1
                await asyncio.sleep(0.05)
                continue
            assert response.status_code == 200, await response.aread()
            text, after = "", draw.randint(1, 10)
            async for line in response.aiter_lines():
                after -= bool(line)
                if leaves and after <= 0:
                    break
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["choices"][0]["text"]
            if leaves:
                tally["left"] += 1
            else:
                assert line.strip() == "data: [DONE]" or text == wanted[name]
                assert text == wanted[name], name
                tally["answered"] += 1


async def _nuisance(url, port, draw, until_, tally):
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60) as client:
        while time.monotonic() < until_:
            kind = draw.randrange(4)
            if kind == 0:
                answer = await client.post("/v1/completions", content=draw.randbytes(200))
                assert answer.status_code == 400
            elif kind == 1:
                answer = await client.post("/v1/completions", content=b"x" * 400_000)
                assert answer.status_code == 413
            elif kind == 2:
                answer = await client.post("/v1/completions", json={"model": "nope", "prompt": "x"})
                assert answer.status_code == 404
            else:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(
                    f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n".encode()
                )
                if draw.random() < 0.5:
                    writer.write(b"Content-Length: 5000\r\n\r\n{")
                await writer.drain()
                await asyncio.sleep(draw.random())
                writer.close()
            tally["nuisance"] += 1
            await asyncio.sleep(0.05)


async def _storm(url, port, seconds, wanted):
    tally = {"answered": 0, "left": 0, "full": 0, "nuisance": 0}
    end, draw = time.monotonic() + seconds, random.Random(0)
    async with asyncio.TaskGroup() as group:
        for n in range(CLIENTS):
            group.create_task(_client(url, random.Random(n), end, wanted, tally))
        for _ in range(4):
            group.create_task(_nuisance(url, port, draw, end, tally))
    return tally


def test_a_storm_leaves_nothing_behind(tmp_path):
    base = kit.save_base(tmp_path / "base")
    for seed, name in enumerate(NAMES[1:]):
        grown(base, tmp_path / "adapters" / name, seed, r=2 * seed + 2)
    wanted = {
        name: expected(base, None if name == "base" else tmp_path / "adapters" / name, ["one two"], TOKENS)[0]
        for name in NAMES
    }
    config = ServerConfig(limits=Limits(cache_tokens=16384))
    with listening(base, tmp_path / "adapters", config=config, body_bytes=100_000, body_seconds=1.0) as up:
        until(lambda: up.server.warmed)
        asyncio.run(_storm(up.url, up.port, 8.0, wanted))  # warms up: allocators, thread pools, caches
        until(lambda: idle(up.server), 60)
        gc.collect()
        before, ours = resident(), threads()
        tally = asyncio.run(_storm(up.url, up.port, SECONDS, wanted))
        until(lambda: idle(up.server), 60)
        gc.collect()
        after = resident()
        assert tally["answered"] > CLIENTS / 2
        assert tally["left"] > 5
        assert tally["nuisance"] > 20
        assert after <= before * 1.05, (before, after)
        assert threads() <= ours
        stats = up.server.engine.stats()
        assert (stats.running, stats.failed) == (0, 0)
        with socket.create_connection(("127.0.0.1", up.port)):
            answer = up.client().post("/v1/completions", json={"model": "a", "prompt": "one two", "max_tokens": TOKENS})
        assert answer.json()["choices"][0]["text"] == wanted["a"]
