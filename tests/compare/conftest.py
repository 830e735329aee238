"""Tiny models in folders and comparisons over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

MakeRecipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{"llama", "roberta"}: folders of tiny models with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    builders = {"llama": tiny.llama, "roberta": tiny.roberta}
    return {name: runs.save_model(root / name, build) for name, build in builders.items()}


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str]) -> MakeRecipe:
    """recipe(task, methods, section={...}, train={...}, ...): a comparison whose runs take some three steps."""

    def make(task: str, methods: list[Any], section: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        classifies = task == "sequence-classification"
        rows = runs.label_rows if classifies else runs.text_rows
        own = {"methods": methods, "seeds": [0], "memory": False, "latency": {"trials": 0}, "search": {"budget": 1}}
        document: dict[str, Any] = {
            "model": models["roberta" if classifies else "llama"],
            "task": task,
            "data": {
                "train": runs.write_rows(tmp_path / "train.jsonl", rows(24, 1)),
                "eval": runs.write_rows(tmp_path / "eval.jsonl", rows(9, 2)),
            },
            "train": {"batch_size": 8},
            "generate": {"max_new_tokens": 3},
            "compare": own | (section or {}),
            "output": str(tmp_path / "out"),
        }
        for key, values in changes.items():
            document[key] = {**document.get(key, {}), **values} if isinstance(values, dict) else values
        return document

    return make
