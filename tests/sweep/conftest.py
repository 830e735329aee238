"""Tiny models in folders and recipes over them, some twenty steps each, without dropout: a sweep must give what runs give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq2seq", "bert": "sequence-classification"}
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
}
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "llama": {},
}
BUILDERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: runs.save_model(root / name, functools.partial(build, **NO_DROPOUT[name]))
        for name, build in BUILDERS.items()
    }


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """recipe("llama", train={...}): sections are merged."""

    def make(model: str = "llama", **changes: Any) -> dict[str, Any]:
        task = TASKS[model]
        rows = runs.label_rows if task == "sequence-classification" else runs.text_rows
        document: dict[str, Any] = {
            "model": models[model],
            "task": task,
            "data": {
                "train": runs.write_rows(tmp_path / "train.jsonl", rows(40, 1)),
                "eval": runs.write_rows(tmp_path / "eval.jsonl", rows(9, 2)),
            },
            "method": {"name": "lora", "r": 4, "target_modules": TARGETS[model]},
            "train": {"batch_size": 4, "lr": 5e-3, "epochs": 2},
            "generate": {"max_new_tokens": 4},
            "evaluate": {"samples": 0},
            "output": str(tmp_path / "sweep"),
        }
        for section, values in changes.items():
            document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
        return document

    return make
