"""A progress bar in bytes, for downloads and conversions; silent unless it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(label: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yield `update(done)`, where done is the number of bytes so far, of `total`.

    The bar goes to standard error, so that `--json` on standard output stays clean.
    """
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))
