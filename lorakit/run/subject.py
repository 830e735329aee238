"""What evaluate, generate and merge work on: a base, perhaps with an adapter, found from a run's or an adapter's folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.attach.anatomy import HEAD_NAMES
from lorakit.errors import UsageError
from lorakit.models import load as load_model
from lorakit.run.device import best_device
from lorakit.run.diffusion.config import TEXT_TO_IMAGE
from lorakit.run.recipe import CLASSIFIERS
from lorakit.store.api import load as load_adapter
from lorakit.store.peft_config import CONFIG
from lorakit.store.read import EXTRA, TENSORS, locate

NAME = "default"  # the adapter's name in a run
PEFT_TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_CLS": "sequence-classification",
    "SEQ_2_SEQ_LM": "seq2seq",
    "QUESTION_ANS": "question-answering",
}


@dataclass(frozen=True)
class Subject:
    """A loaded model, with the adapter on where there is one.

    tokenizer: for images the model's image processor. label_names: of a classification, in the head's order.
    """

    model: Any
    tokenizer: Any
    name: str
    task: str
    label_names: Sequence[str] | None
    adapter: Path | None


def adapter_folder(source: str | Path) -> Path:
    """The adapter's folder of `source`: a run's folder, an adapter's own, or a hub id."""
    path = Path(source).expanduser()
    if _is_adapter(path / "adapter"):
        return path / "adapter"
    if (path / "recipe.yaml").is_file() and not _is_adapter(path):
        raise UsageError(f"the run in {path} has no adapter yet. Let it finish (lorakit train ... --resume).")
    return locate(source)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder has the file that says what the adapter is: PEFT's, or lorakit's own."""
    return (folder / CONFIG).is_file() or (folder / EXTRA).is_file()


def open_subject(
    source: str | Path | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    dtype: str | None = None,
    trainable: bool = False,
    dense: bool = False,
) -> Subject:
    """Load a base and an adapter.

    source: a run's folder, an adapter's folder or a hub id; None = the base alone. model: the base; None = what the adapter
    names. task: None = what the adapter was trained for, else causal-lm. A run on a quantised base (`base.quantize`) is opened
    on the same, from weights of the same type; dense: leave it unquantised all the same, as merging needs it.
    dtype: None = that, else float32. Raises UsageError, ModelError, FileError.
    """
    if source is None and model is None:
        raise UsageError("nothing to work on: name a run's folder, an adapter or a base model (--model).")
    folder = None if source is None else adapter_folder(source)
    notes = {} if folder is None else _notes(folder)
    base = model or notes.get("model") or (None if folder is None else _base_name(folder))
    if base is None:
        raise UsageError(f"{source} does not say which base model it belongs to. Name it: --model.")
    chosen = task or notes.get("task") or (None if folder is None else _peft_task(folder)) or "causal-lm"
    if chosen == TEXT_TO_IMAGE:
        raise UsageError(
            f"{source or base} is of {TEXT_TO_IMAGE}: use it in a diffusers pipeline, by pipeline.load_lora_weights(run's "
            "folder), or by lorakit.load(pipeline.unet, the run's adapter folder)."
        )
    labels, quantize = notes.get("label_names"), None if dense else notes.get("quantize")
    outputs = _outputs(folder) if folder is not None and chosen in CLASSIFIERS and labels is None else None
    loaded = load_model(
        base,
        task=chosen,
        dtype=dtype or (notes.get("base_dtype") if quantize else None) or "float32",
        quantize=quantize,
        label_names=labels,
        num_labels=outputs if outputs != 1 else None,
        regression=outputs == 1,
        device=best_device(),
        progress=True,
    )
    if folder is not None:
        load_adapter(loaded.model, folder, NAME, trainable=trainable)
    if chosen in CLASSIFIERS and labels is None:
        labels = _own_labels(loaded.model.config)
    return Subject(loaded.model, loaded.tokenizer, base, chosen, labels, folder)


def _own_labels(config: Any) -> list[str] | None:
    """The class names that a classifier's own config gives; None for a regression, and for LABEL_0, LABEL_1, ..."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    unnamed = names == [f"LABEL_{number}" for number in range(len(names))]
    return None if config.num_labels == 1 or unnamed else names


def _notes(folder: Path) -> dict[str, Any]:
    return _json(folder / EXTRA)


def _peft_task(folder: Path) -> str | None:
    """The task of an adapter that another program wrote, after PEFT's `task_type`."""
    return PEFT_TASKS.get(str(_json(folder / CONFIG).get("task_type")))


def _outputs(folder: Path) -> int | None:
    """How many outputs the classification head in an adapter's files has; None where they hold none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / TENSORS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if "lora_" not in key}  # noqa: SIM118
    except (OSError, SafetensorError):  # loading the adapter then says what is wrong with it
        return None
    heads = [
        shape[0]
        for key, shape in shapes.items()
        if len(shape) == 2 and any(f".{name}." in f".{key}" for name in HEAD_NAMES)
    ]
    return min(heads, default=None)  # a head's last layer is its narrowest


def _base_name(folder: Path) -> str | None:
    name = _json(folder / CONFIG).get("base_model_name_or_path") or _notes(folder).get("base_model")
    return None if name is None else str(name)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none (loading the adapter then says what is wrong with it)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
