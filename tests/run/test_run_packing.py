"""Whole runs on packed rows and token-budget batches: the same steps, the same losses, resumed to the same bytes."""

import json
import os
import signal
from pathlib import Path

import pytest
import runs
import torch

import lorakit as lk
from lorakit.data import load_examples
from lorakit.data.pack import SEGMENTS
from lorakit.errors import RecipeError
from lorakit.models import load
from lorakit.run.batches import EncodedBatches, batches_of, encode_rows, packed
from lorakit.run.listen import Listener
from lorakit.run.recipe import load_recipe
from lorakit.train.loss import objective_for


class Notes(Listener):
    """Keeps what a run tells, and stops it after a step."""

    def __init__(self, stop=None):
        self.notes, self.stop = [], stop

    def note(self, text):
        self.notes.append(text)

    def row(self, row, total_steps):
        if row["step"] == self.stop and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def made(monkeypatch):
    """The batches that training was given."""
    seen, make = [], EncodedBatches.make

    def kept(self, epoch, start):
        for batch in make(self, epoch, start):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(EncodedBatches, "make", kept)
    return seen


def curve(folder, *keys):
    return [[row[key] for key in ("step", *keys)] for row in runs.read_rows(folder / "metrics.jsonl") if keys[0] in row]


def adapter(folder):
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_packed_steps_are_the_unpacked_ones(recipe, made, tmp_path, task, accumulate):
    changes = {"method": {"dropout": 0.0}, "data": {"eval": None}, "evaluate": {"samples": 0}}
    if task == "sequence-classification":  # texts of unequal length, and no dropout of the model's own
        rows = [{**row, "text": row["text"] * (1 + number % 4)} for number, row in enumerate(runs.label_rows(24, 1))]
        config = Path(recipe(task)["model"]) / "config.json"
        still = tmp_path / "still"
        still.mkdir()
        for file in config.parent.iterdir():
            (still / file.name).write_bytes(file.read_bytes())
        none = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        (still / "config.json").write_text(json.dumps(json.loads(config.read_text()) | none))
        changes |= {
            "model": str(still),
            "data": {"eval": None, "train": runs.write_rows(tmp_path / "texts.jsonl", rows)},
        }
    train = {"accumulate": accumulate, "epochs": 2, "group_by_length": False}
    plain = lk.train(recipe(task, train={**train, "packing": False}, output=str(tmp_path / "plain"), **changes))
    assert not any(SEGMENTS in batch for batch in made)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
    positions = sum(batch["input_ids"].numel() for batch in made)
    made.clear()
    listener = Notes()
    packed = lk.train(recipe(task, train={**train, "packing": True}, **changes), listener=listener)
    assert any(SEGMENTS in batch for batch in made)
    assert sum(batch["input_ids"].numel() for batch in made) < positions
    assert sum(int((batch.get(SEGMENTS, batch.get("attention_mask")) > 0).sum()) for batch in made) == tokens
    for ours, theirs in zip(curve(packed.folder, "loss"), curve(plain.folder, "loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert packed.summary["steps"] == plain.summary["steps"] == 12 // accumulate
    assert any(note.startswith("rows are packed: ") for note in listener.notes)


@pytest.mark.parametrize(
    ("task", "train"),
    [
        ("causal-lm", {"packing": True, "group_by_length": False}),
        ("sequence-classification", {"packing": True, "accumulate": 2, "group_by_length": False}),
        ("causal-lm", {"batch_tokens": 90}),
        ("seq2seq", {"batch_tokens": 90}),
    ],
)
def test_stopped_inside_an_epoch_and_resumed_to_the_same_bytes(recipe, tmp_path, task, train):
    settings = {"epochs": 2, **train}
    done = lk.train(recipe(task, train=settings, output=str(tmp_path / "whole")))
    document = recipe(task, train=settings)
    for step in (2, 5):
        assert lk.train(document, listener=Notes(step), resume=step == 5).interrupted
    resumed = lk.train(document, resume=True)
    assert adapter(resumed.folder) == adapter(done.folder)
    assert runs.steps_of(resumed.folder / "metrics.jsonl") == runs.steps_of(done.folder / "metrics.jsonl")


def test_a_token_budget_holds_as_many_as_fit(recipe, made):
    document = recipe(train={"batch_tokens": 100, "packing": False})
    done = lk.train(document)
    lengths = [row for batch in made for row in batch["attention_mask"].sum(1).tolist()]
    assert len(lengths) == 24
    assert all(batch["input_ids"].numel() <= 100 for batch in made)
    assert done.summary["steps"] == len(made)
    assert any(len(batch["input_ids"]) > 4 for batch in made)
    positions = sum(batch["input_ids"].numel() for batch in made)
    assert positions < 1.2 * sum(lengths)


def test_measuring_is_never_packed(recipe, models):
    document = load_recipe(recipe(train={"group_by_length": False}))
    loaded = load(models["llama"], task="causal-lm")
    rows = encode_rows(document, loaded, load_examples(document.data.train))
    batches = batches_of(document, loaded, rows)
    batches.pack_length = 256
    assert any(SEGMENTS in batch for batch in batches.make(0, 0))
    assert not any(SEGMENTS in batch for batch in batches.evaluation())
    whole, late = list(batches.make(0, 0)), list(batches.make(0, 2))
    assert len(late) == len(whole) - 2
    for ours, theirs in zip(late, whole[2:], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_auto_does_without_where_it_cannot(recipe):
    listener = Notes()
    lk.train(recipe("seq2seq"), listener=listener)
    assert any("rows are not packed: T5ForConditionalGeneration takes no position_ids" in one for one in listener.notes)
    listener = Notes()
    document = recipe(data={"eval": None})
    lk.train(document, loss=lambda model, batch: model(**batch).loss, listener=listener, overwrite=True)
    assert any("rows are not packed: a loss of one's own" in note for note in listener.notes)


def test_wanted_where_it_cannot_be(recipe):
    with pytest.raises(RecipeError, match="packing is wanted, but T5ForConditionalGeneration takes no position_ids"):
        lk.train(recipe("seq2seq", train={"packing": True}))
    with pytest.raises(RecipeError, match=r"packing is wanted, but a loss of one's own"):
        lk.train(recipe(train={"packing": True}), loss=lambda model, batch: model(**batch).loss)
    with pytest.raises(RecipeError, match=r"pack_length is 4000, but the model takes rows of at most 64 tokens"):
        lk.train(recipe(train={"pack_length": 4000}))
    with pytest.raises(RecipeError, match=r"train\.packing must be auto, true or false"):
        lk.train(recipe(train={"packing": "maybe"}))


@pytest.mark.parametrize("train", [{"batch_tokens": 64}, {"packing": True}, {"pack_length": 64}])
def test_batches_without_tokens_take_no_such_settings(recipe, train):
    document, plain = load_recipe(recipe(train=train)), objective_for("causal-lm")
    with pytest.raises(RecipeError, match="are of rows of tokens"):
        packed(document, None, object(), plain, own_loss=False, note=print)
    assert packed(load_recipe(recipe()), None, object(), plain, own_loss=False, note=print) is plain
