"""The frozen-prefix cache in whole runs: the adapter of the run without it, the same bytes after a stop, told refusals."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import RecipeError
from lorakit.run.listen import Listener


class Ear(Listener):
    """Hears the notes, and presses Ctrl-C after a step."""

    def __init__(self, stop=None):
        self.notes, self.stop = [], stop

    def note(self, text):
        self.notes.append(text)

    def row(self, row, total_steps):
        if row["step"] == self.stop and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    @property
    def kept(self):
        return [note for note in self.notes if "run once for each row" in note]


@pytest.fixture
def upper(recipe, tmp_path):
    """upper(task, **train): a recipe of two epochs that adapts the upper of two blocks of a base without dropout."""

    def make(task="causal-lm", method=None, **train):
        settings = {"epochs": 2, "packing": False, **train}
        method = {"target_modules": "all-linear", "layers_to_transform": [1], **(method or {})}
        document = recipe(task, train=settings, method=method)
        if task == "sequence-classification":
            calm = partial(tiny.roberta, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            folder = tmp_path / "calm"
            document["model"] = str(folder) if folder.exists() else runs.save_model(folder, calm)
        return document

    return make


def done(document, ear=None, **more):
    ear = ear or Ear()
    result = lk.train(document, listener=ear, overwrite=not more.get("resume"), **more)
    return ear, load_file(result.folder / "adapter" / "adapter_model.safetensors")


def adapter(document):
    return (Path(document["output"]) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("packing", [False, "auto"])
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_the_adapter_is_that_of_the_run_without(upper, task, packing):
    fixed = {"packing": packing, "method": {"dropout": 0.0}}
    plain, expected = done(upper(task, prefix_cache=False, **fixed))
    ear, found = done(upper(task, **fixed))
    assert plain.kept == []
    assert ear.kept == ["1 of 2 blocks are run once for each row; their states take 0.00 GiB"]
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize(
    "train", [{}, {"prefix_memory": 0.0, "packing": "auto"}, {"accumulate": 2, "gradient_checkpointing": True}]
)
def test_stopped_and_resumed_the_bytes_are_the_same(upper, task, train):
    document = upper(task, **train)
    assert done(document)[0].kept
    whole = adapter(document)
    done(document, Ear(stop=2))
    assert adapter(document) != whole
    done(document, Ear(stop=4), resume=True)
    assert done(document, resume=True)[0].kept
    assert adapter(document) == whole
    names = {path.name for path in Path(document["output"]).rglob("*") if path.is_file()}
    assert not [name for name in names if "prefix" in name or name.startswith("tmp")]


def test_left_alone_where_it_gains_nothing(upper):
    assert done(upper(epochs=1))[0].notes == [note for note in done(upper(epochs=1))[0].notes if "blocks" not in note]
    assert done(upper(method={"layers_to_transform": [0, 1]}))[0].kept == []


def test_forced_in_a_single_epoch(upper):
    assert done(upper(epochs=1, prefix_cache=True))[0].kept


def test_auto_says_why_not(upper, recipe):
    document = upper("sequence-classification")
    document["model"] = recipe("sequence-classification")["model"]  # with its dropout of 0.1
    (said,) = [note for note in done(document)[0].notes if "not kept" in note]
    assert "dropout" in said
    (said,) = [note for note in done(upper(prefix_memory=0.0, prefix_disk=1e-6))[0].notes if "not kept" in note]
    assert "train.prefix_disk" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": {"layers_to_transform": [0]}}, "the lowest block, is trained"),
        ({"prefix_memory": 0.0, "prefix_disk": 0.0}, "are allowed"),
    ],
)
def test_forced_where_it_cannot_be(upper, change, reason):
    with pytest.raises(RecipeError, match=f"prefix_cache is wanted, but .*{reason}"):
        done(upper(prefix_cache=True, **change))


def test_forced_with_a_loss_of_ones_own(upper):
    with pytest.raises(RecipeError, match="a loss of one's own"):
        done(upper(prefix_cache=True), loss=lambda model, batch: model(**batch).loss)


def test_forced_for_another_task(recipe):
    with pytest.raises(RecipeError, match="it is for the losses of"):
        done(recipe("seq2seq", train={"prefix_cache": True}))


def test_a_value_that_makes_no_sense(upper):
    with pytest.raises(RecipeError, match="prefix_cache"):
        done(upper(prefix_cache="always"))
    with pytest.raises(RecipeError, match="prefix_memory"):
        done(upper(prefix_memory=-1.0))


def test_the_last_block_pruned_or_whole_is_the_same_adapter(upper):
    fixed = {"method": {"dropout": 0.0}, "prefix_cache": False}
    _, expected = done(upper("sequence-classification", prune_last_block=False, **fixed))
    _, found = done(upper("sequence-classification", **fixed))
    for key, tensor in found.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-3, atol=1e-4), key
