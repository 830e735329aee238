"""lorakit serve"""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.show import console, plural
from lorakit.errors import UsageError
from lorakit.run.device import best_device
from lorakit.serve.guard import Access
from lorakit.serve.keys import ADMIN, API, check_start, read_keys
from lorakit.serve.limits import Limits
from lorakit.serve.listen import ListenConfig, listen
from lorakit.serve.server import Server, ServerConfig


def run(
    base: Annotated[str, typer.Option(help="The base model: a packaged name, a folder, a .gguf file or a hub id.")],
    adapters: Annotated[Path, typer.Option(help="The folder of adapters (the registry); made where it is missing.")],
    task: Annotated[
        str, typer.Option(help="causal-lm, sequence-classification or feature-extraction.")
    ] = ServerConfig.task,
    num_labels: Annotated[int | None, typer.Option(help="Labels of a base that is no classifier yet.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base's weights.")] = ServerConfig.dtype,
    device: Annotated[str | None, typer.Option(help="Where to compute; default: the accelerator there is.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = ListenConfig.host,
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = ListenConfig.port,
    keys_file: Annotated[Path | None, typer.Option(help=f"API keys, one a line; also from {API}.")] = None,
    admin_keys_file: Annotated[Path | None, typer.Option(help=f"Admin keys, one a line; also from {ADMIN}.")] = None,
    memory: Annotated[float, typer.Option(help="Main memory for adapters, in GiB.", min=0.001)] = ServerConfig.memory
    / (1 << 30),
    queue: Annotated[int, typer.Option(help="Requests that may wait or run at once.")] = Limits.queue,
    seconds: Annotated[float, typer.Option(help="The most time of a request.")] = Limits.seconds,
    strict: Annotated[bool, typer.Option(help="An adapter's part of an answer is the same in any batch.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it answers, and for what, as one line of JSON.")
    ] = False,
) -> None:
    """Example: lorakit serve --base smollm2-135m-instruct --adapters adapters/"""
    access = Access(read_keys(API, keys_file), read_keys(ADMIN, admin_keys_file))
    check_start(host, access.api, access.admin)  # before minutes go into loading a model
    _check_parts()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = ServerConfig(
        task=task,
        num_labels=num_labels,
        dtype=dtype,
        device=device or best_device(),
        memory=round(memory * (1 << 30)),
        strict=strict,
        limits=Limits(queue=queue, seconds=seconds),
    )
    notes = console()
    with Server(base, adapters, config) as server:
        names = sorted(server.registry.entries())

        def began(chosen: int) -> None:
            url = f"http://{f'[{host}]' if ':' in host else host}:{chosen}/v1"
            if as_json:
                typer.echo(json.dumps({"url": url, "model": server.model_name, "adapters": names}))
            notes.print(f"{server.model_name} with {plural(len(names), 'adapter')} answers on {url}", soft_wrap=True)
            if not access.admin:
                notes.print(f"  the admin routes are closed: set {ADMIN} to open them", soft_wrap=True)

        listen(server, access, ListenConfig(host=host, port=port), began=began)
        notes.print("stopped: no request is left")


def _check_parts() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"lorakit serve needs {error.name}: pip install 'lorakit[serve]'.") from error
    del fastapi, prometheus_client
