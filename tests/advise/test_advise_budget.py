"""Advice on a budget: what fits is counted as attach counts, and the order is the measurement's."""

import json

import pytest
import runs
import tiny
import yaml

import lorakit as lk
from lorakit.advise.budget import advise_budget, find_candidates
from lorakit.cli import main
from lorakit.errors import UsageError
from lorakit.run.recipe import load_recipe
from lorakit.sweep.api import sweep

BUILDERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: runs.save_model(root / name, build) for name, build in BUILDERS.items()}


@pytest.fixture
def recipe(tmp_path, models):
    return {
        "model": models["llama"],
        "data": {
            "train": runs.write_rows(tmp_path / "train.jsonl", runs.text_rows(24, 1)),
            "eval": runs.write_rows(tmp_path / "eval.jsonl", runs.text_rows(9, 2)),
        },
        "method": {"name": "lora", "alpha": 8},
        "train": {"batch_size": 4, "lr": 5e-3},
        "evaluate": {"samples": 0},
        "output": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_a_candidate_has_the_parameters_that_it_says(kind, models):
    task = "sequence-classification" if kind == "bert" else "causal-lm"
    document = load_recipe({"model": models[kind], "task": task, "data": {"train": "t", "eval": "e"}})
    found, _ = find_candidates(document, 1500, [("q",), ("q", "v"), ("q", "k", "v", "o"), ("gate", "up", "down")])
    assert len(found) == 4
    for one in found:
        assert one.parameters <= 1500
        method = {key.partition(".")[2]: value for key, value in one.changes.items()}
        model = BUILDERS[kind]()
        assert lk.attach(model, lk.LoRA(**method), name="a").trainable == one.parameters
        again = lk.LoRA(**{**method, "r": one.rank + 1})
        assert lk.attach(BUILDERS[kind](), again, name="a").trainable > 1500
    assert found[3].targets == (("gate", "up", "down") if kind == "llama" else ("up", "down"))


def test_what_every_rank_trains_is_in_the_budget(models):
    method = {"name": "lora", "use_dora": True, "lora_bias": True}
    document = load_recipe({"model": models["llama"], "method": method, "data": {"train": "t", "eval": "e"}})
    found, _ = find_candidates(document, 3000, [("q",), ("q", "v")])
    for one in found:
        assert one.parameters <= 3000
        own = {key.partition(".")[2]: value for key, value in one.changes.items()}
        made = lk.LoRA(use_dora=True, lora_bias=True, **own)
        assert lk.attach(tiny.llama(), made, name="a").trainable == one.parameters


def test_patterns_of_the_recipe_do_not_reach_the_candidates(models):
    method = {"name": "lora", "rank_pattern": {"q_proj": 16}}
    document = load_recipe({"model": models["llama"], "method": method, "data": {"train": "t", "eval": "e"}})
    found, _ = find_candidates(document, 1024, [("q",), ("q", "v")])
    for one in found:
        own = {key.partition(".")[2]: value for key, value in one.changes.items()}
        assert (
            lk.attach(tiny.llama(), lk.LoRA(**{**method_fields(method), **own}), name="a").trainable == one.parameters
        )
    fused = {"name": "lora", "enable_lora": {"c_attn": [True, False, True]}, "target_modules": ["c_attn"]}
    document = load_recipe({"model": models["gpt2"], "method": fused, "data": {"train": "t", "eval": "e"}})
    (only,), _ = find_candidates(document, 1024, [("o",)])
    own = {key.partition(".")[2]: value for key, value in only.changes.items()}
    assert lk.attach(tiny.gpt2(), lk.LoRA(**{**method_fields(fused), **own}), name="a").trainable == only.parameters


def method_fields(method):
    return {key: value for key, value in method.items() if key != "name"}


def test_the_best_measured_is_first_and_nothing_is_trained_twice(recipe, tmp_path):
    how = {"sweep": sweep, "output": tmp_path / "budget", "seeds": [0, 1], "steps": 3, "examples": 20}
    found = advise_budget(
        recipe, 500, combinations=[("q",), ("q", "v"), ("q", "k", "v", "o", "gate", "up", "down")], **how
    )
    scores = [one.score for one in found.rows]
    assert scores == sorted(scores)
    assert found.score == "loss"
    assert len(found.rows) == 2
    assert "rank 1 takes" in found.left_out[0]
    for one in found.rows:
        folders = [path for path in (tmp_path / "budget").iterdir() if path.is_dir()]
        own = [
            json.loads((path / "summary.json").read_text())["low_rank_parameters"]
            for path in folders
            if load_recipe(path / "recipe.yaml").method.r == one.candidate.rank
        ]
        assert own == [one.candidate.parameters] * 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "budget").rglob("*.safetensors")}
    advise_budget(recipe, 500, combinations=[("q",), ("q", "v")], **how)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "budget").rglob("*.safetensors")}
    best = yaml.safe_load(found.yaml())["method"]
    assert best["r"] == found.rows[0].candidate.rank


def test_what_cannot_be_judged_is_refused(recipe, tmp_path):
    how = {"sweep": sweep, "output": tmp_path / "budget"}
    with pytest.raises(UsageError, match="whole number"):
        advise_budget(recipe, 0, **how)
    with pytest.raises(UsageError, match="no combination fits"):
        advise_budget(recipe, 10, **how)
    del recipe["data"]["eval"]
    with pytest.raises(UsageError, match=r"data\.eval"):
        advise_budget(recipe, 1000, **how)


def test_the_command(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as left:
        main(["analyze", str(path), "--advise", "--budget", "2000", "--steps", "1", "--examples", "8", "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 9
    assert all(row["candidate"]["parameters"] <= 2000 for row in found["rows"])
    assert found["folder"] == str(tmp_path / "run-budget-2000")
