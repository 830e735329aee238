"""A recipe of recipes/, as it stands, on a tiny model of its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from recipe_kit import CASES, RECIPES, save_vit

from lorakit.run.train import RunResult, train


@pytest.fixture
def run_recipe(tmp_path: Path) -> Callable[..., RunResult]:
    """run_recipe("gpt2-e2e", "train.epochs=3", ...): two steps of the recipe's file, with model, data and output replaced."""

    def run(name: str, *overrides: str, **options: Any) -> RunResult:
        case, model = CASES[name], tmp_path / "model"
        if not model.exists():
            _ = save_vit(model) if name.startswith("vit") else runs.save_model(model, case.build)
            (tmp_path / "data").mkdir()
        data = case.write(tmp_path / "data")
        places = [f"data.{key}={path}" for key, path in data.items()]
        # MRPC begins from a run of MNLI's recipe, of which test_recipes_start.py sees to it
        afresh = () if any(one.startswith("start_from") for one in overrides) else ("start_from=null",)
        steps = () if any(one.startswith("train.max_steps") for one in overrides) else ("train.max_steps=2",)
        return train(
            RECIPES / f"{name}.yaml",
            overrides=[
                f"model={model}",
                f"output={tmp_path / 'run'}",
                "generate.max_new_tokens=8",
                *places,
                *steps,
                *afresh,
                *overrides,
            ],
            **options,
        )

    return run
