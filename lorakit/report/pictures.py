"""A curve as a file of its own."""

from pathlib import Path

from lorakit.errors import UsageError
from lorakit.report.parts import Curve
from lorakit.report.picture import draw
from lorakit.store.files import write_bytes

FORMS = ("png", "svg")
DPI = 200  # pixels an inch: 1000 by 600


def save_picture(curve: Curve, path: str | Path) -> Path:
    """Write `curve` with its title to `path`, a .png or .svg, whole or not at all.

    Raises UsageError for another ending or a curve with no finite point, OutputError where it cannot be written.
    """
    path = Path(path)
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMS:
        raise UsageError(f"expected a picture's name to end in .png or .svg, got {path.name!r}: change its ending.")
    write_bytes(path, draw(curve, form, titled=True, dpi=DPI))
    return path
