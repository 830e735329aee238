"""The command line: a lazy table of verbs, one file a verb; no tensor code."""

import atexit
import functools
import gc
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorakit.errors import LorakitError

VERBS = {
    "demo": "Adapt a model from questions to SQL, prove it, and show what it cost.",
    "train": "Train an adapter as a recipe says.",
    "evaluate": "Measure a model, with or without an adapter, on data.",
    "generate": "Answer prompts.",
    "sweep": "Train many adapters at once on one frozen base, and compare them in one table.",
    "compare": "Compare methods on your data: one table, one picture.",
    "merge": "Merge an adapter into its base and write a plain transformers folder.",
    "convert": "Rewrite an adapter's files as another program's, exactly.",
    "inspect": "Tell what an adapter holds.",
    "analyze": "Show how many directions an adapter uses, and where they lie.",
    "compress": "Write an adapter of lower ranks, and tell what that loses.",
    "verify": "List every fault of an adapter's files.",
    "plan": "Tell what adapting a model takes: parameters, memory, bytes, FLOPs.",
    "serve": "Answer for one base and a folder of adapters over HTTP, as OpenAI's API.",
    "bench": "Measure lorakit side by side with what else there is.",
    "models": "List the packaged models, and fetch one.",
}
GROUPS = {"bench": "Example: lorakit bench train --model gpt2-small --rows equal,masked --json"}
"""Verbs with commands of their own (`COMMANDS` of their file: name -> summary and function), and what ends their help."""


def build(verb: str | None) -> Any:
    """The typer application. Only the file of `verb` is imported: `lorakit --help` imports no torch."""
    import typer

    app = typer.Typer(
        name="lorakit",
        help="Low-rank adaptation of language models: train, prove, merge and share adapters on one frozen base.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="markdown",
    )

    @app.callback()
    def root() -> None:
        """Keeps `lorakit VERB` the form even while a single verb is registered."""

    for name, summary in VERBS.items():
        if name == verb and name in GROUPS:
            app.add_typer(_group(name), name=name, help=summary, epilog=GROUPS[name])
        else:
            function = _guarded(_module(name).run) if name == verb else _closed
            app.command(name, help=summary, epilog=function.__doc__)(function)
    return app


def _group(verb: str) -> Any:
    """The commands of a verb that has several."""
    import typer

    group = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

    @group.callback()
    def root() -> None:
        """Keeps `lorakit VERB COMMAND` the form even while a single command is registered."""

    for name, (summary, function) in _module(verb).COMMANDS.items():
        group.command(name, help=summary, epilog=function.__doc__)(_guarded(function))
    return group


def _closed() -> None:
    """Stands for a verb that was not asked for."""


def _module(verb: str) -> Any:
    with uncollected():
        return importlib.import_module(f"lorakit.cli.{verb}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the cyclic collector: importing makes a million objects that stay, which it would look through time and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as error:  # typer would leave without a word
            raise LorakitError("interrupted.") from error

    return guarded


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 0, 1 (failed: one message, no traceback) or 2 (wrong command line)."""
    if arguments is None:
        atexit.register(
            gc.freeze
        )  # a last look through all that was imported takes most of a second, and finds nothing
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in words if not word.startswith("-")), None)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            build(verb)(args=words, prog_name="lorakit")
        except LorakitError as error:
            _fail(str(error), as_json="--json" in words)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as a user reads it: no file, no line of source."""
    sys.stderr.write(f"warning: {message}\n")


def _fail(message: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": message}) + "\n")
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)
