"""A run's folder: recipe.yaml, adapter/, metrics.jsonl, summary.json, report.html, checkpoints/."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import FileError, OutputError
from lorakit.store.files import write_json, write_text

MARKS = ("recipe.yaml", "adapter", "metrics.jsonl", "checkpoints", "summary.json", "report.html")


class RunFolder:
    """The files of one run. Opening it for a new run refuses a folder that holds one already."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.adapter = self.path / "adapter"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.checkpoint = self.path / "checkpoints" / "last"

    def begin(self, recipe: str, *, overwrite: bool) -> None:
        """Make the folder for a new run. Raises OutputError where it holds a run and `overwrite` is off."""
        held = [name for name in MARKS if (self.path / name).exists()]
        if held and not overwrite:
            raise OutputError(
                f"{self.path} holds a run already ({', '.join(held)}). Choose another output, go on with it (--resume), or "
                "replace it (--overwrite)."
            )
        for name in held:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
        write_text(self.recipe, recipe)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl; a number that is not finite is written as null."""
        clean = {
            key: value if not isinstance(value, float) or abs(value) < float("inf") else None
            for key, value in row.items()
        }
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write {self.metrics}: {error.strerror or error}. Free some space and resume."
            ) from error

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
        write_json(self.summary, summary)

    def read_summary(self) -> dict[str, Any]:
        """summary.json's content. Raises FileError."""
        try:
            content = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(f"{self.summary} cannot be read:", [str(error)]) from error
        return dict(content)
