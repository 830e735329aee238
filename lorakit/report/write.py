"""The report as a file that is there whole or not at all."""

from pathlib import Path

from lorakit.report.page import render
from lorakit.report.parts import Report
from lorakit.store.files import write_text


def write_report(path: str | Path, report: Report) -> Path:
    """Write `report` as one HTML file to `path` (folders on the way are made) and return the path.

    Raises OutputError where it cannot be written (a full disk, a folder without the right to write); what was at
    `path` before is then still there.
    """
    write_text(Path(path), render(report))
    return Path(path)
