"""What evaluate, generate and merge work on: a base, perhaps with an adapter, found from a run's or an adapter's folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UsageError
from lorakit.models import load as load_model
from lorakit.store.api import load as load_adapter
from lorakit.store.read import CONFIG, EXTRA, locate

NAME = "default"


@dataclass(frozen=True)
class Subject:
    """A loaded model, with the adapter on where there is one. label_names: of a classification, in the head's order."""

    model: Any
    tokenizer: Any
    name: str
    task: str
    label_names: Sequence[str] | None
    adapter: Path | None


def adapter_folder(source: str | Path) -> Path:
    """The adapter's folder of `source`: a run's folder, an adapter's own, or a hub id."""
    path = Path(source).expanduser()
    return path / "adapter" if (path / "adapter" / CONFIG).is_file() else locate(source)


def open_subject(
    source: str | Path | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    dtype: str = "float32",
    trainable: bool = False,
) -> Subject:
    """Load a base and an adapter.

    source: a run's folder, an adapter's folder or a hub id; None = the base alone. model: the base; None = what the adapter
    names. task: None = what the adapter was trained for, else causal-lm. Raises UsageError, ModelError, FileError.
    """
    if source is None and model is None:
        raise UsageError("nothing to work on: name a run's folder, an adapter (--adapter) or a base model (--model).")
    folder = None if source is None else adapter_folder(source)
    notes = {} if folder is None else _notes(folder)
    base = model or notes.get("model") or (None if folder is None else _base_name(folder))
    if base is None:
        raise UsageError(f"{source} does not say which base model it belongs to. Name it: --model.")
    chosen = task or notes.get("task") or "causal-lm"
    labels = notes.get("label_names")
    loaded = load_model(
        base,
        task=chosen,
        dtype=dtype,
        label_names=labels,
        regression=chosen == "sequence-classification" and folder is not None and labels is None,
        progress=True,
    )
    if folder is not None:
        load_adapter(loaded.model, folder, NAME, trainable=trainable)
    return Subject(loaded.model, loaded.tokenizer, base, chosen, labels, folder)


def _notes(folder: Path) -> dict[str, Any]:
    return _json(folder / EXTRA)


def _base_name(folder: Path) -> str | None:
    name = _json(folder / CONFIG).get("base_model_name_or_path")
    return None if name is None else str(name)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none (loading the adapter then says what is wrong with it)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
