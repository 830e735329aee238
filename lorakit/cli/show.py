"""How the command line shows things: bars and notes on stderr, results on stdout."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lorakit.run.folder import finite
from lorakit.run.listen import Listener


def console() -> Console:
    """Where notes and bars go. No markup: names and paths with brackets are to be read as they are."""
    return Console(stderr=True, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout; a number that is not finite is null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right. The title is a line of its own: in the table's a path would be broken."""
    table = Table()
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        table.add_column(column, justify="right" if rows and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    # A pipe has no width: nothing is folded for whoever reads it.
    out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    if title is not None:
        out.print(title, style="bold", soft_wrap=True)
    out.print(table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


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
        TextColumn("{task.description}", markup=False),
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
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=None)
        self._console.print(text, style="bold", soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", soft_wrap=True)

    def progress(self, done: int, total: int) -> None:
        self._update(done, total, "")

    def row(self, row: Mapping[str, float], total_steps: int) -> None:
        evaluated = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
        if evaluated:
            measured = ", ".join(f"{name} {value:.4g}" for name, value in evaluated.items())
            self.note(f"step {row['step']:,.0f}, on the eval set: {measured}")
        else:
            speed = f"  {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
            self._update(int(row["step"]), total_steps, f"loss {row['loss']:.3f}{speed}")

    def _update(self, done: int, total: int, text: str) -> None:
        if self._progress is None:
            return
        if not self._progress.live.is_started:
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total, description=f"  {text}")

    def _close(self) -> None:
        if self._progress is not None and self._progress.live.is_started:
            self._progress.stop()
        self._progress = None
