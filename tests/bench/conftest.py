"""Tiny models and data for the bench."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{"llama", "gpt2", "bert"}: folders of tiny models; {"texts", "labels"}: data files."""
    root = tmp_path_factory.mktemp("bench")
    found = {name: runs.save_model(root / name, tiny.MODELS[name]) for name in ("llama", "gpt2", "bert")}
    found["texts"] = runs.write_rows(Path(root / "texts.jsonl"), runs.text_rows(90, 1))
    found["labels"] = runs.write_rows(Path(root / "labels.jsonl"), runs.label_rows(120, 2))
    return found
