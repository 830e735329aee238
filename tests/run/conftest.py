"""Tiny models in folders and recipes over them."""

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
    """{"llama", "roberta", "t5"}: folders of tiny models with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    builders = {"llama": tiny.llama, "roberta": tiny.roberta, "t5": tiny.t5}
    return {name: runs.save_model(root / name, build) for name, build in builders.items()}


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str]) -> MakeRecipe:
    """recipe("causal-lm", train={...}, ...): a recipe for a run of some six steps; sections are merged."""

    def make(task: str = "causal-lm", **changes: Any) -> dict[str, Any]:
        rows = {"sequence-classification": runs.label_rows}.get(task, runs.text_rows)
        model = {"sequence-classification": "roberta", "seq2seq": "t5"}.get(task, "llama")
        targets = ["query", "value"] if model == "roberta" else ["q", "v"] if model == "t5" else ["q_proj", "v_proj"]
        document: dict[str, Any] = {
            "model": models[model],
            "task": task,
            "data": {
                "train": runs.write_rows(tmp_path / "train.jsonl", rows(24, 1)),
                "eval": runs.write_rows(tmp_path / "eval.jsonl", rows(9, 2)),
            },
            "method": {"name": "lora", "r": 4, "target_modules": targets, "dropout": 0.1},
            "train": {"batch_size": 4, "lr": 5e-3, "epochs": 1},
            "generate": {"max_new_tokens": 6},
            "evaluate": {"samples": 2},
            "output": str(tmp_path / "run"),
        }
        for section, values in changes.items():
            document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
        return document

    return make
