"""Whole comparisons on tiny models: rows, files, resuming after a kill, failures that stay their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
from compare_kit import Q_PROJ, QUERY

from lorakit.compare import study as study_module
from lorakit.compare.api import compare
from lorakit.compare.child import Child
from lorakit.errors import OutputError
from lorakit.run.listen import Listener
from lorakit.run.train import train


class Log(Listener):
    def __init__(self):
        self.stages = []

    def stage(self, text):
        self.stages.append(text)

    @property
    def made(self):
        return [text for text in self.stages if "learning rate" in text]


SIZES = {**QUERY, "label": "LoRA", "sizes": {"r": [1, 2]}}


@pytest.fixture
def classes(recipe):
    """Four runs."""
    return recipe("sequence-classification", [SIZES], {"seeds": [0, 1]})


def test_classification_end_to_end(recipe):
    section = {"seeds": [0, 1], "search": {"budget": 2}, "latency": {"trials": 2}}
    classes = recipe("sequence-classification", [SIZES], section)
    log = Log()
    found = compare(classes, listener=log)
    assert [row.label for row in found.rows] == ["most frequent class", "LoRA r=1", "LoRA r=2"]
    assert len(log.made) == 2 * 2 + 2 * 2
    for row, r in zip(found.methods, (1, 2), strict=True):
        assert len(row.done) == 2
        assert row.trained == r * 4 * 2 * 32  # two layers, two projections, two matrices; the head aside
        assert len(row.tried) == 2
        assert row.lr == max(map(float, row.tried), key=lambda lr: (row.tried[f"{lr:g}"], -lr))
        assert [(one["batch"], one["length"]) for one in row.latency] == [(1, 32), (16, 32)]
        assert all(min(one["over"], one["merged_over"], one["seconds"]) > 0 for one in row.latency)
        assert row.adapter_bytes > 4 * row.trained
    assert found.rows[0].quality.mean == pytest.approx(1 / 3)
    assert any(note.startswith("LoRA: accuracy against r is") for note in found.notes)
    out = Path(classes["output"])
    told = json.loads((out / "results.json").read_text())
    assert [row["trained"] for row in told["rows"]] == [None, 256, 512]
    table = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == [row.label for row in found.rows]
    assert float(table[1]["quality_mean"]) == found.methods[0].quality.mean
    assert (out / "quality-parameters.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("LoRA") > 4
    assert "<svg" in page
    assert not list(out.rglob("checkpoints/last"))


def test_a_run_is_the_run_that_train_makes(classes):
    """On the shared base, after others: the same metrics, bit for bit, as `lorakit train` alone with that recipe and seed."""
    found = compare(classes)
    for row in found.methods:
        for run in row.runs:
            place = Path(classes["output"], "runs", row.label.lower().replace(" ", "-").replace("=", "-"))
            folder = place / f"lr-{run.lr:g}-seed-{run.seed}"
            again = train(folder / "recipe.yaml", overrides=[f"output={folder}-again"])
            assert again.summary["after"] == run.metrics
            steps = [runs.steps_of(one / "metrics.jsonl") for one in (folder, again.folder)]
            assert steps[0] == steps[1]


def test_a_language_models_run_is_the_run_that_train_makes(recipe, models):
    """Nothing of it is drawn while it is loaded, so no second copy is loaded for another seed."""
    methods = [{**Q_PROJ, "dropout": 0.2, "lr": 1e-2}]
    document = recipe("causal-lm", methods, {"seeds": [3, 4], "few_shot": [1]})
    found = compare(document)
    for run in found.methods[0].runs:
        folder = Path(document["output"], "runs", "lora", f"lr-0.01-seed-{run.seed}")
        again = train(folder / "recipe.yaml", overrides=[f"output={folder}-again"])
        assert runs.steps_of(folder / "metrics.jsonl") == runs.steps_of(again.folder / "metrics.jsonl")
        ours, theirs = (one / "adapter" / "adapter_model.safetensors" for one in (folder, again.folder))
        assert ours.read_bytes() == theirs.read_bytes()


def test_started_again_it_makes_nothing_twice(recipe):
    section = {"search": {"budget": 2}, "latency": {"trials": 1}}
    classes = recipe("sequence-classification", [QUERY], section)
    first, log = compare(classes), Log()
    again = compare(classes, listener=log)
    assert log.made == []
    assert not any("latency" in stage for stage in log.stages)
    assert json.dumps(again.as_dict(), sort_keys=True) == json.dumps(first.as_dict(), sort_keys=True)
    log = Log()
    more = {**classes, "compare": {**classes["compare"], "seeds": [0, 1]}}
    compare(more, listener=log)
    assert [text.rpartition(", ")[2] for text in log.made] == ["seed 1"]
    runs.write_rows(Path(classes["data"]["eval"]), runs.label_rows(12, 7))
    log = Log()
    compare(classes, listener=log)
    assert len(log.made) == 3  # other data, other results


def test_killed_and_started_again(classes, tmp_path):
    """SIGKILL in the midst: what was finished is not made again, and what comes out is what an unbroken comparison gives."""
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(classes))
    code = "import json, sys; from lorakit.compare.api import compare; compare(json.load(open(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment, stderr=subprocess.DEVNULL)
    out = Path(classes["output"]) / "runs"
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*/lr-*/outcome.json"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {one: one.stat().st_mtime_ns for one in out.glob("*/*lr-*/outcome.json")}
    log = Log()
    found = compare(classes, listener=log)
    assert 2 <= len(finished) < 4
    assert len(log.made) == 4 - len(finished)
    assert all(one.stat().st_mtime_ns == before for one, before in finished.items())
    unbroken = compare({**classes, "output": str(tmp_path / "unbroken")})
    for one, other in zip(found.methods, unbroken.methods, strict=True):
        assert (one.lr, one.tried) == (other.lr, other.tried)
        assert [run.metrics for run in one.runs] == [run.metrics for run in other.runs]


def test_failures_stay_their_own(recipe, monkeypatch):
    broken = {"name": "lora", "label": "nowhere", "target_modules": ["nosuch"]}
    wild = {**QUERY, "label": "wild", "lr": 1e30}
    document = recipe("sequence-classification", [broken, wild, QUERY], {"seeds": [0, 1], "search": {"budget": 3}})
    log = Log()
    found = compare(document, listener=log)
    nowhere, wild_row, lora = found.methods
    assert (nowhere.status, nowhere.quality, nowhere.lr) == ("failed", None, None)
    assert "target_modules" in nowhere.failed[0].reason
    assert sum("nowhere" in text for text in log.made) == 1  # another rate would not help
    assert (wild_row.status, len(wild_row.failed)) == ("failed", 2)
    assert "learning rate" in wild_row.failed[0].reason
    assert lora.status == "done"
    assert found.best is lora
    assert any(note.startswith("nowhere: failed.") for note in found.notes)
    page = Path(document["output"], "report.html").read_text()
    assert "failed" in page
    log = Log()
    compare(document, listener=log)
    assert log.made == []
    compare(document, listener=log, retry_failed=True)
    assert {text.split(",")[0] for text in log.made} == {"nowhere", "wild"}


def test_a_run_that_changes_the_base_fails_and_spoils_no_other(recipe, monkeypatch):
    document = recipe("sequence-classification", [{**QUERY, "label": "good", "lr": 1e-3}])
    expected = compare(document).methods[0].runs[0].metrics
    document["compare"]["methods"].insert(0, {**QUERY, "label": "bad", "lr": 1e-3})
    document["output"] += "-2"
    plain = Child.trained

    def spoil(child):
        if "bad" in child.recipe.output:
            with torch.no_grad():
                child.model.roberta.embeddings.word_embeddings.weight[5] += 1
        return plain(child)

    monkeypatch.setattr(Child, "trained", spoil)
    bad, good = compare(document).methods
    assert (bad.status, "changed" in bad.failed[0].reason) == ("failed", True)
    assert good.runs[0].metrics == expected


def test_language_model_rows(recipe, tmp_path):
    general = tmp_path / "general.txt"
    general.write_text("the sun and the moon are red and green. " * 30)
    section = {"few_shot": [1, 2], "general": {"text": str(general), "window": 64, "tokens": 500}, "seeds": [0, 1]}
    document = recipe(
        "causal-lm",
        [{**Q_PROJ, "lr": 5e-2}],
        section,
        evaluate={"metrics": ["rougeL", "exact_match"]},
        train={"epochs": 2},
    )
    found = compare(document)
    assert [row.label for row in found.rows] == ["base, zero-shot", "base, 1-shot", "base, 2-shot", "lora"]
    zero, one, _, lora = found.rows
    assert (len(zero.runs), len(one.runs)) == (1, 2)
    assert zero.perplexity.mean == found.perplexity_before
    assert lora.perplexity.mean != found.perplexity_before
    assert set(lora.runs[0].metrics) == {"rougeL", "exact_match"}
    assert (found.quality, found.higher, found.middle) == ("rougeL", True, "mean")


def test_the_loss_where_no_metric_is_named(recipe):
    document = recipe(
        "causal-lm", [{**Q_PROJ, "lr": 2e-2}, {**Q_PROJ, "label": "idle", "lr": 1e-12}], {"few_shot": [1]}
    )
    found = compare(document)
    zero, _, lora, idle = found.rows
    assert (found.quality, found.higher) == ("loss", False)
    assert idle.quality.mean == pytest.approx(zero.quality.mean, abs=1e-4)
    assert lora.quality.mean < idle.quality.mean
    assert found.best is lora


@pytest.mark.long
def test_memory_is_measured_in_a_process_of_its_own(recipe):
    document = recipe("sequence-classification", [{**QUERY, "lr": 1e-3}], {"memory": True})
    found = compare(document)
    assert found.methods[0].peak_memory > 0
    assert found.methods[0].notes == []


def test_a_figure_that_cannot_be_had_is_a_note(recipe, monkeypatch):
    def broken(*args):
        raise RuntimeError("no meter")

    monkeypatch.setattr(study_module, "peak_of", broken)
    found = compare(recipe("sequence-classification", [{**QUERY, "lr": 1e-3}], {"memory": True}))
    assert found.methods[0].peak_memory is None
    assert "lora: its memory was not measured: RuntimeError: no meter" in found.notes


def test_two_at_once_are_refused(recipe):
    from filelock import FileLock

    document = recipe("sequence-classification", [QUERY])
    Path(document["output"]).mkdir()
    with FileLock(Path(document["output"]) / ".lock"), pytest.raises(OutputError, match="another comparison"):
        compare(document)
