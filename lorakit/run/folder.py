"""A run's folder: recipe.yaml, adapter/, metrics.jsonl, summary.json, report.html, checkpoints/."""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import FileError, OutputError
from lorakit.run.track import FOLDER as TRACKED
from lorakit.store.files import write_json, write_text
from lorakit.store.foreign.source import DIFFUSERS as FILES
from lorakit.train.state import FILE as STATE

DIFFUSERS = FILES[0]
MARKS = ("recipe.yaml", "adapter", DIFFUSERS, "metrics.jsonl", "checkpoints", "summary.json", "report.html", TRACKED)


class RunFolder:
    """The files of one run. Opening it for a new run refuses a folder that holds one already."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.adapter = self.path / "adapter"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.start = self.path / "checkpoints" / "start.json"
        self.checkpoint = self.path / "checkpoints" / "last"

    def check_free(self, *, overwrite: bool) -> None:
        """Raise OutputError where a new run could not begin: the folder holds a run (and `overwrite` is off), or is none."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file. Choose another output: a run needs a folder.")
        held = self.held()
        if held and not overwrite:
            ways = ["choose another output", "replace it (--overwrite)"]
            if self.has_checkpoint():
                ways.insert(1, "go on with it (--resume)")
            raise OutputError(
                f"{self.path} holds a run already ({', '.join(held)}): {', '.join(ways[:-1])} or {ways[-1]}."
            )

    def begin(self, recipe: str, start: Mapping[str, Any]) -> None:
        """Clear what an earlier run left and write what a new one knows at its start. Raises OutputError."""
        try:
            for name in self.held():
                place = self.path / name
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                else:
                    place.unlink()
        except OSError as error:
            raise OutputError(f"cannot replace the run in {self.path}: {error.strerror or error}.") from error
        write_text(self.recipe, recipe)
        write_json(self.start, start)

    def held(self) -> list[str]:
        """The names of a run's files that are there."""
        return [name for name in MARKS if (self.path / name).exists()]

    def has_checkpoint(self) -> bool:
        return (self.checkpoint / STATE).is_file()

    def read_start(self) -> dict[str, Any]:
        """What the run knew at its start. Raises FileError."""
        return _read_object(self.start)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl; a number that is not finite is written as null."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(row)) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.metrics}: {error.strerror or error}.") from error

    def cut_rows(self, step: int) -> None:
        """Drop rows after `step`: a resumed run writes them again."""
        if self.metrics.is_file():
            kept = []
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line torn by the crash
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line)
            write_text(self.metrics, "".join(line + "\n" for line in kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary, finite(summary))

    def read_summary(self) -> dict[str, Any]:
        """summary.json's content. Raises FileError."""
        return _read_object(self.summary)


def finite(value: Any) -> Any:
    """`value` with every number that is not finite, however deep, as None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read:", [str(error)]) from error
    if not isinstance(content, dict):
        raise FileError(f"{path} cannot be read:", [f"expected a JSON object, came {type(content).__name__}"])
    return content
