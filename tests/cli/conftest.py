"""The command line in this process, over tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import yaml

from lorakit.cli import main


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def lorakit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """lorakit("train", "recipe.yaml", ...): what a call says, and its exit code."""

    def call(*words: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return Said(int(left.value.code or 0), said.out, said.err)

    return call


@dataclass(frozen=True)
class Place:
    """A folder with a tiny causal model, data, a recipe and the run that came of it."""

    root: Path
    model: str
    recipe: Path
    run: Path


def _place(root: Path, build: Any, rows: Any, **document: Any) -> Place:
    model = runs.save_model(root / "model", build)
    train, test = (
        runs.write_rows(root / f"{name}.jsonl", rows(24, seed)) for seed, name in enumerate(("train", "eval"))
    )
    recipe = {
        "model": model,
        "data": {"train": train, "eval": test},
        "train": {"batch_size": 8, "lr": 5e-3},
        "generate": {"max_new_tokens": 5, "stop": ["z"]},
        "output": str(root / "run"),
        **document,
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as left:
        main(["train", str(path)])
    assert not left.value.code
    return Place(root, model, path, root / "run")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return _place(tmp_path_factory.mktemp("texts"), tiny.llama, runs.text_rows, method={"target_modules": ["q_proj"]})


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return _place(
        tmp_path_factory.mktemp("classes"),
        tiny.roberta,
        runs.label_rows,
        task="sequence-classification",
        method={"target_modules": ["query"]},
    )
