"""How the command line shows things: bars and notes on stderr, results on stdout."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lorakit.run.listen import Listener


def console() -> Console:
    """Where notes and bars go."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    out = Console(highlight=False)
    out.print(table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextmanager
def bar(text: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields `update(done, total)`."""
    if quiet:
        yield lambda done, total: None
        return
    with _progress() as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console(),
        transient=False,
    )


class Terminal(Listener):
    """A run on a terminal: a line a stage, a bar with loss, tokens/s and time left while it trains."""

    def __init__(self) -> None:
        self._console = console()
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def stage(self, text: str) -> None:
        self._close()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(text, total=None)
        self._console.print(text, style="bold")

    def note(self, text: str) -> None:
        self._console.print(f"  {text}")

    def progress(self, done: int, total: int) -> None:
        self._update(done, total, "")

    def row(self, row: Mapping[str, float], total_steps: int) -> None:
        evaluated = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
        if evaluated:
            self.note(
                f"step {row['step']:.0f}: " + ", ".join(f"{name} {value:.4g}" for name, value in evaluated.items())
            )
        else:
            speed = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
            self._update(int(row["step"]), total_steps, speed)

    def _update(self, done: int, total: int, text: str) -> None:
        if self._progress is None:
            return
        if not self._progress.live.is_started:
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total, description=text or None)

    def _close(self) -> None:
        if self._progress is not None and self._progress.live.is_started:
            self._progress.stop()
        self._progress = None
