"""The README.md of an adapter folder: a model card in the hub's form."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

HUB_ID = re.compile(r"[\w.-]*\w/[\w.-]+")


def model_card(config: Mapping[str, Any], tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> str:
    """Markdown with the hub's YAML head: base, rank, size, and how to load it in lorakit and in PEFT."""
    base = config.get("base_model_name_or_path")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    head = ["---", "library_name: peft", "tags:", "- lora", "- lorakit"]
    head += [f"base_model: {base}"] if HUB_ID.fullmatch(str(base)) else []
    metrics = _numbers(extra.get("metrics"))
    lines = [
        *head,
        "---",
        "",
        f"# LoRA adapter for {base or 'a base model'}",
        "",
        f"Rank {config['r']}, alpha {config['lora_alpha']}, {numbers:,} parameters, trained with lorakit.",
        "",
        *([f"Evaluation: {metrics}.", ""] if metrics else []),
        "```python",
        "import lorakit as lk",
        'lk.load(model, "path/to/this/folder")',
        "```",
        "",
        'or in PEFT: `PeftModel.from_pretrained(model, "path/to/this/folder")`.',
        "",
    ]
    return "\n".join(lines)


def method_card(method: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> str:
    """The same for a method that PEFT does not have. method: its class's name; extra: lorakit.json's content."""
    base = extra.get("base_model")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    head = ["---", "library_name: lorakit", "tags:", "- lorakit"]
    head += [f"base_model: {base}"] if HUB_ID.fullmatch(str(base)) else []
    metrics = _numbers(extra.get("metrics"))
    lines = [
        *head,
        "---",
        "",
        f"# {method} for {base or 'a base model'}",
        "",
        f"{numbers:,} parameters, trained with lorakit; its settings are in lorakit.json.",
        "",
        *([f"Evaluation: {metrics}.", ""] if metrics else []),
        "```python",
        "import lorakit as lk",
        'lk.load(model, "path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _numbers(metrics: object) -> str:
    """ "accuracy 0.91, loss 0.2": the numbers of a run's metrics, whatever else a note of that name holds."""
    found = metrics.items() if isinstance(metrics, Mapping) else ()
    return ", ".join(f"{name} {value:.4g}" for name, value in found if isinstance(value, int | float))
