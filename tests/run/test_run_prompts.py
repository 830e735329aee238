"""Whole runs with prefixes and prompts: they train, go on where they were cut off, and refuse rows that leave no room."""

from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit.errors import DataError
from lorakit.run.listen import Listener

METHODS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"length": 4},
    "p-tuning": {"length": 3},
    "prefix-embedding": {"prefix_length": 3, "infix_length": 2},
    "prefix-tuning": {"prefix_length": 4, "infix_length": 2, "reparametrise": True},
}


class CutError(Exception):
    """The run is cut off."""


class Cut(Listener):
    """Cuts a run off at its fifth row of figures."""

    seen = 0

    def row(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen == 5:
            raise CutError


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_cut_off_ends_as_the_whole_one(name: str, recipe: Any, tmp_path: Path) -> None:
    found = []
    for kind in ("whole", "cut"):
        document = recipe(train={"save_every": 2, "log_every": 1}, output=str(tmp_path / kind))
        document["method"] = {"name": name, **METHODS[name]}
        if kind == "cut":
            with pytest.raises(CutError):
                lk.train(document, listener=Cut())
        result = lk.train(document, resume=kind == "cut")
        assert result.summary["trainable_parameters"] > 0
        found.append((tmp_path / kind / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_classifier_is_trained_with_its_head(name: str, recipe: Any, tmp_path: Path) -> None:
    document = recipe("sequence-classification")
    document["method"] = {"name": name, **METHODS[name]}
    result = lk.train(document)
    model = result.model
    assert lk.count_parameters(model).replaced > 0
    assert lk.verify(tmp_path / "run" / "adapter").ok


@pytest.mark.parametrize("more", [{}, {"max_length": 60}])
def test_rows_that_a_prefix_leaves_no_room_are_refused_before_training(more: dict[str, Any], recipe: Any) -> None:
    document = recipe(data=more)
    document["method"] = {"name": "prefix-tuning", "prefix_length": 45}  # of 64
    with pytest.raises(DataError, match="the most is 19"):
        lk.train(document)
