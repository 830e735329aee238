"""Predictions on disk."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all. Raises OutputError where it cannot be written."""
    from lorakit.store.files import write_atomically  # brings safetensors, which measuring does without

    def fill(place: Path) -> None:
        with place.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    write_atomically(Path(path), fill)
