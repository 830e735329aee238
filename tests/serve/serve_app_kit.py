"""What the tests of the registry and the app share: a tiny base with adapters as folders, and a server that listens."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapting
import runs
import tiny

import lorakit as lk
from lorakit.generate import GenerateConfig, generate
from lorakit.models import load
from lorakit.serve.guard import Access
from lorakit.serve.keys import make_keys
from lorakit.serve.server import Server, ServerConfig

API_KEY, ADMIN_KEY = "api-key-0123456789", "admin-key-0123456789"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def adapter_folder(folder: Path, kind: str = "llama", seed: int = 0, **fields: Any) -> Path:
    """An adapter with random values on a tiny model, saved as lorakit saves."""
    model = tiny.MODELS[kind]()
    lk.attach(model, lk.LoRA(**({"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]} | fields)), seed=seed)
    adapting.grow(model, "default", seed, std=0.3)
    return lk.save(model, folder)


def hash_of(folder: Path) -> str:
    """What the adapter's own lorakit.json says."""
    return str(json.loads((folder / "lorakit.json").read_text())["adapter"])


def save_base(folder: Path) -> str:
    """A Llama of 512 positions with a tokenizer of letters and a chat template."""
    name = runs.save_model(folder, lambda **fields: tiny.llama(max_position_embeddings=512, **fields))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return name


def grown(base: str, folder: Path, seed: int, **fields: Any) -> Path:
    """An adapter of that base."""
    model = load(base).model
    lk.attach(
        model, lk.LoRA(**({"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]} | fields)), seed=seed
    )
    adapting.grow(model, "default", seed, std=0.3)
    return lk.save(model, folder)


def expected(base: str, adapter: Path | None, prompts: Sequence[Any], tokens: int, **fields: Any) -> list[str]:
    """The greedy answers of the adapter alone, by lorakit.generate."""
    loaded = load(base)
    if adapter is not None:
        lk.load(loaded.model, adapter)
    return generate(loaded.model, loaded.tokenizer, prompts, GenerateConfig(max_new_tokens=tokens, **fields))


@dataclass(frozen=True)
class Listening:
    """A server that answers on a port of this machine."""

    server: Server
    port: int
    clients: ExitStack

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = API_KEY, **fields: Any) -> Any:
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        made = httpx.Client(base_url=self.url, headers=headers, timeout=60, **fields)
        self.clients.callback(made.close)
        return made

    def admin(self) -> Any:
        return self.client(ADMIN_KEY)

    def openai(self) -> Any:
        import openai

        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=60)
        return self.clients.enter_context(made)

    def connect(self) -> socket.socket:
        return self.clients.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=30))


@contextmanager
def listening(
    base: Any, folder: Path, *, config: ServerConfig | None = None, header_seconds: float = 10.0, **access: Any
) -> Iterator[Listening]:
    """A server with keys, behind uvicorn in a thread."""
    import uvicorn

    from lorakit.serve.app import build_app
    from lorakit.serve.listen import ListenConfig, uvicorn_settings

    keys = {"api": make_keys([API_KEY]), "admin": make_keys([ADMIN_KEY])}
    with Server(base, folder, config) as server, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        app = build_app(server, Access(**(keys | access)))
        inner = uvicorn.Server(uvicorn_settings(app, ListenConfig(header_seconds=header_seconds)))
        thread = threading.Thread(target=lambda: inner.run(sockets=[bound]))
        thread.start()
        until(lambda: inner.started)
        try:
            with ExitStack() as clients:
                yield Listening(server, bound.getsockname()[1], clients)
        finally:
            inner.should_exit = True
            thread.join()


def until(true: Any, seconds: float = 30.0) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be so"
        time.sleep(0.01)


def idle(server: Server) -> bool:
    """Whether the engine holds no request, and the bank no adapter for one."""
    return server.engine.stats().running == 0 and all(one.users == 0 for one in server.bank.resident())
