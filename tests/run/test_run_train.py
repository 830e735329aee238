"""Whole runs on tiny models: what stands in the folder, what is refused, what is not lost."""

import errno
import json
import math
import sys

import pytest
import runs
import torch
import yaml
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import DataError, LorakitError, OutputError, RecipeError, TargetError, TrainingError, UsageError
from lorakit.run.listen import Listener
from lorakit.run.recipe import load_recipe

TASKS = ("causal-lm", "seq2seq", "sequence-classification")


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


class Heard(Listener):
    def __init__(self):
        self.stages, self.notes, self.rows, self.totals = [], [], [], set()

    def stage(self, text):
        self.stages.append(text)

    def note(self, text):
        self.notes.append(text)

    def row(self, row, total_steps):
        self.rows.append(dict(row))
        self.totals.add(total_steps)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_its_folder(recipe, task):
    heard = Heard()
    document = recipe(task, train={"eval_every": 2, "save_every": 4})
    result = lk.train(document, listener=heard)
    folder = result.folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"recipe.yaml", "adapter", "metrics.jsonl", "checkpoints", "summary.json", "report.html"}
    assert load_recipe(folder / "recipe.yaml") == load_recipe(document)
    rows = runs.read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 6]
    assert heard.rows == rows
    assert heard.totals == {6}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    wanted = {
        "steps",
        "best_step",
        "trainable_parameters",
        "total_parameters",
        "adapter_bytes",
        "model_bytes",
        "seconds",
    }
    assert wanted <= summary.keys()
    assert summary["steps"] == 6
    assert summary["adapter_bytes"] == len(adapter(folder))
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert ("lorakit generate" in page) == (task != TASKS[2])
    assert ("accuracy" in summary["after"]) == (task == TASKS[2])
    assert any("parameters are trained" in note for note in heard.notes)


def test_the_result_is_ready_to_use_and_is_what_is_stored(recipe):
    result = lk.train(recipe())
    ids = torch.tensor([[5, 6, 7]])
    assert not result.model.training
    with torch.no_grad():
        ours = result.model(ids).logits
        with lk.use(result.model, None):
            base = result.model(ids).logits
        lk.detach(result.model, "default")
        lk.load(result.model, result.folder / "adapter")
        assert torch.equal(result.model(ids).logits, ours)
    assert not torch.equal(ours, base)


def test_samples_before_and_after_stand_in_the_report(recipe, tmp_path):
    document = recipe(evaluate={"samples": 2, "metrics": ["exact_match", "bleu"]})
    result = lk.train(document)
    assert set(result.summary["before"]) == set(result.summary["after"]) == {"exact_match", "bleu"}
    page = (result.folder / "report.html").read_text()
    prompt = runs.read_rows(tmp_path / "eval.jsonl")[0]["prompt"]
    assert prompt.replace(">", "&gt;") in page


def test_seeds(recipe):
    first = adapter(lk.train(recipe()).folder)
    assert adapter(lk.train(recipe(), overwrite=True).folder) == first
    assert adapter(lk.train(recipe(train={"seed": 1}), overwrite=True).folder) != first


@pytest.mark.filterwarnings("ignore:this CPU has no bf16")
def test_two_precisions_in_one_process(recipe, tmp_path):
    first = lk.train(recipe())
    half = lk.train(recipe(train={"precision": "bf16"}, output=str(tmp_path / "half")))
    again = lk.train(recipe(output=str(tmp_path / "again")))
    assert adapter(again.folder) == adapter(first.folder) != adapter(half.folder)
    assert {tensor.dtype for tensor in load_file(half.folder / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_a_loss_of_ones_own(recipe):
    seen = []

    def loss(model, batch):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        value = model(**inputs).logits.square().mean()
        seen.append(float(value.detach()))
        return value

    result = lk.train(recipe(data={"eval": None}, train={"max_steps": 3}), loss=loss)
    rows = runs.read_rows(result.folder / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(seen, rel=1e-6)


def test_regression(recipe, tmp_path):
    names = {"train": "scores.jsonl", "eval": "scores2.jsonl"}
    data = {key: runs.write_rows(tmp_path / name, runs.score_rows(12, len(name))) for key, name in names.items()}
    result = lk.train(recipe("sequence-classification", data=data, train={"best_metric": "pearson"}))
    assert set(result.summary["after"]) == {"pearson", "spearman"}
    assert json.loads((result.folder / "adapter" / "lorakit.json").read_text())["label_names"] is None


# -- what is refused


def test_a_folder_with_a_run_is_refused_untouched(recipe, tmp_path):
    document = recipe()
    folder = lk.train(document).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        OutputError, match=r"holds a run already .*another output, go on with it .--resume. or replace it"
    ):
        lk.train(recipe(train={"lr": 1e-4}))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    lk.train(recipe(train={"lr": 1e-4, "max_steps": 2}), overwrite=True)
    assert len(runs.read_rows(folder / "metrics.jsonl")) == 3


def test_a_run_that_never_trained_leaves_nothing_in_the_way(recipe):
    with pytest.raises(TargetError):
        lk.train(recipe(method={"target_modules": ["nothing"]}))
    assert lk.train(recipe()).summary["steps"] == 6


def test_a_failed_overwrite_keeps_the_old_run(recipe):
    folder = lk.train(recipe()).folder
    first = adapter(folder)
    with pytest.raises(TargetError):
        lk.train(recipe(method={"target_modules": ["nothing"]}), overwrite=True)
    assert adapter(folder) == first


def test_an_output_that_is_a_file(recipe, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        lk.train(recipe())
    assert (tmp_path / "run").read_text() == "mine"


def rows_with(tmp_path, change, rows=None):
    rows = rows or runs.text_rows(8)
    return runs.write_rows(tmp_path / "changed.jsonl", change(rows))


@pytest.mark.parametrize(
    ("task", "section", "change", "kind", "message"),
    [
        ("causal-lm", "train", lambda rows: [], DataError, "empty"),
        ("causal-lm", "train", lambda rows: [*rows, {"prompt": "x"}], DataError, "line 9.*completion"),
        ("causal-lm", "train", lambda rows: [*rows, {"prompt": "x" * 90, "completion": "y"}], DataError, "line 9.*64"),
        ("causal-lm", "train", lambda rows: runs.label_rows(6), DataError, "task causal-lm does not go with"),
        ("causal-lm", "eval", lambda rows: runs.label_rows(6), DataError, "task causal-lm does not go with"),
        ("sequence-classification", "train", lambda rows: rows, DataError, "sequence-classification does not go with"),
        ("sequence-classification", "eval", lambda rows: [{"text": "a", "label": "odd"}], DataError, "odd"),
        ("sequence-classification", "eval", lambda rows: [{"text": "a", "label": 3}], DataError, "3"),
        ("sequence-classification", "test", lambda rows: [{"text": "a" * 90, "label": "pos"}], DataError, "line 1"),
    ],
)  # fmt: skip
def test_data_that_do_not_do(recipe, tmp_path, task, section, change, kind, message):
    path = rows_with(tmp_path, change)
    with pytest.raises(kind, match=message):
        lk.train(recipe(task, data={section: path}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("causal-lm", {"data": {"train": None}}, r"data\.train is missing"),
        ("causal-lm", {"evaluate": {"metrics": ["accuracy"]}}, "accuracy"),
        ("causal-lm", {"evaluate": {"metrics": ["belu"]}}, "Did you mean 'bleu'"),
        ("causal-lm", {"data": {"eval": None}, "evaluate": {"metrics": ["bleu"]}}, "nor data.eval"),
        ("causal-lm", {"data": {"eval": None}, "train": {"eval_every": 2}}, "need data.eval"),
        ("causal-lm", {"train": {"best_metric": "bleu"}}, "judged by its loss"),
        ("sequence-classification", {"train": {"best_metric": "matthews"}}, "loss, accuracy, f1_macro"),
        ("sequence-classification", {"evaluate": {"metrics": ["bleu"]}}, "bleu"),
        ("causal-lm", {"method": {"r": 0}}, "r"),
        ("causal-lm", {"base": {"dtype": "float8"}}, "float8"),
        ("causal-lm", {"model": "no-such-model"}, "no-such-model"),
    ],
)
def test_settings_that_do_not_do_are_told_before_training(recipe, tmp_path, task, changes, message):
    with pytest.raises(LorakitError, match=message):
        lk.train(recipe(task, **changes))
    assert not (tmp_path / "run").exists()


def test_a_loss_of_ones_own_has_no_label_smoothing(recipe):
    with pytest.raises(RecipeError, match="label_smoothing"):
        lk.train(recipe(train={"label_smoothing": 0.1}), loss=lambda model, batch: None)


# -- numbers that are none, disks that are full


def nan_at(step):
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = model(**batch).loss
        return value * math.nan if len(calls) == step else value

    return loss


@pytest.mark.parametrize("step", [1, 4])
def test_a_nan_loss_leaves_a_finite_adapter(recipe, tmp_path, step):
    document = recipe(data={"eval": None}, method={"dropout": 0.0})
    with pytest.raises(TrainingError, match=f"loss is nan at step {step}"):
        lk.train(document, loss=nan_at(step))
    folder = tmp_path / "run"
    assert not lk.inspect(folder / "adapter").faults
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name) == (step > 2)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_while_metrics_are_written(recipe, tmp_path, monkeypatch):
    """The adapter as far as it is, and the checkpoint before, are there to go on from."""
    reference = adapter(lk.train(recipe(train={"save_every": 2}, output=str(tmp_path / "whole"))).folder)
    module, real = sys.modules["lorakit.run.folder"], open

    def full_at_step_4(path, *args, **kwargs):
        here = tmp_path / "run" / "metrics.jsonl"
        if path == here and here.exists() and len(runs.read_rows(here)) == 4:
            full_disk()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module, "open", full_at_step_4, raising=False)
    with pytest.raises(OutputError, match=r"No space left.*adapter as of step 5 is in .*--resume"):
        lk.train(recipe(train={"save_every": 2}))
    assert not lk.inspect(tmp_path / "run" / "adapter").faults
    monkeypatch.undo()
    assert adapter(lk.train(recipe(train={"save_every": 2}), resume=True).folder) == reference


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "summary.json", "report.html", "recipe.yaml", "state.safetensors"]
)
def test_a_disk_that_fills_while_something_else_is_written(recipe, tmp_path, monkeypatch, name):
    files, real = sys.modules["lorakit.store.files"], sys.modules["lorakit.store.files"].os.replace

    def full(source, target):
        if str(target).endswith(name):
            full_disk()
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OutputError, match="o space left"):
        lk.train(recipe())
    monkeypatch.undo()
    run = tmp_path / "run"
    if name in ("summary.json", "report.html", "state.safetensors"):
        assert not lk.inspect(run / "adapter").faults
    if name in ("summary.json", "report.html", "adapter_config.json"):  # trained to its end: resuming writes what lacks
        assert lk.train(recipe(), resume=True).summary["steps"] == 6
        assert (run / "report.html").is_file()


# -- the recipe file


def test_the_stored_recipe_runs_again(recipe, tmp_path):
    first = lk.train(recipe()).folder
    stored = tmp_path / "again.yaml"
    stored.write_text((first / "recipe.yaml").read_text())
    result = lk.train(stored, overrides=[f"output={tmp_path / 'second'}"])
    assert adapter(result.folder) == adapter(first)
    assert yaml.safe_load((result.folder / "recipe.yaml").read_text())["output"] == str(tmp_path / "second")


def test_resume_without_a_run(recipe):
    with pytest.raises(UsageError, match="no checkpoint to go on from"):
        lk.train(recipe(), resume=True)
