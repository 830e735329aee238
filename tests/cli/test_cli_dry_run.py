"""`lorakit train --dry-run`: the figures, against the run itself and counts of our own; nothing is written."""

import json

import pytest
import runs
import yaml


@pytest.fixture
def dry(lorakit, tmp_path):
    """dry(place, ...): the JSON of a dry run whose output folder must not appear."""

    def call(place, *words):
        out = tmp_path / "out"
        said = lorakit("train", place.recipe, "--dry-run", "--json", "--set", f"output={out}", *words)
        assert said.code == 0, said.err
        assert not out.exists()
        return said.json

    return call


def test_figures_are_those_of_the_run(dry, texts):
    found = dry(texts)
    summary = json.loads((texts.run / "summary.json").read_text())
    assert found["trainable"] == summary["trainable_parameters"]
    assert found["total"] == summary["total_parameters"]
    assert found["steps"] == summary["steps"] == 3
    assert found["memory"]["base"] == summary["model_bytes"]
    rows = runs.read_rows(texts.root / "train.jsonl")
    # the tokenizer has a token a letter; the completion's end carries loss too
    assert found["epoch"]["targets"] == sum(len(row["completion"]) + 1 for row in rows)
    letters = sum(len(row["prompt"]) + len(row["completion"]) for row in rows)
    assert letters + len(rows) <= found["epoch"]["tokens"] <= letters + 2 * len(rows)
    assert found["epoch"]["examples"] == len(rows)
    first = runs.read_rows(texts.run / "metrics.jsonl")
    losses = [row["loss"] for row in first if "loss" in row]
    assert found["loss"] == pytest.approx(losses[2], rel=1e-4)  # the same first steps


def test_memory_has_its_terms(dry, texts):
    memory = dry(texts)["memory"]
    terms = ["base", "adapter", "gradients", "optimizer", "activations"]
    assert memory["total"] == sum(memory[term] for term in terms)
    assert memory["gradients"] == 4 * dry(texts)["trainable"]
    assert memory["adapter"] == 2 * memory["gradients"]  # and its newest good values
    assert 2 * memory["gradients"] <= memory["optimizer"] < 2 * memory["gradients"] + 1024
    assert memory["activations"] > 0


def test_activations_grow_with_the_batch(dry, texts):
    small, large = (
        dry(texts, "--set", f"train.batch_size={size}", "--set", "train.packing=false")["memory"] for size in (2, 8)
    )
    assert 2 < large["activations"] / small["activations"] < 8


def test_padding_follows_the_batches(dry, texts):
    words = ["--set", "train.packing=false"]
    sorted_, drawn, alone = (
        dry(texts, *words, "--set", change)["epoch"]
        for change in ("train.group_by_length=true", "train.group_by_length=false", "train.batch_size=1")
    )
    assert alone["padding"] == 0
    assert 0 <= sorted_["padding"] < drawn["padding"] < 1
    assert sorted_["tokens"] == drawn["tokens"] == alone["tokens"]


def test_classification_with_accumulation(dry, classes):
    found = dry(classes, "--set", "train.accumulate=2", "--set", "train.epochs=3")
    assert found["steps"] == 6
    assert found["epoch"]["targets"] == 24
    assert found["epoch"]["loss_share"] is None
    assert found["seconds"] > 0


def test_words(lorakit, texts):
    said = lorakit("train", texts.recipe, "--dry-run")  # its folder holds a run: a dry run does not care
    assert said.code == 0
    assert [line.split("  ")[0] for line in said.out.splitlines()] == [
        "parameters",
        "memory",
        "held so far",
        "examples",
        "tokens",
        "with loss",
        "learning rate",
        "steps",
        "time",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "begins nothing"),
        (["--overwrite"], "begins nothing"),
        (["--set", "data.train=none.jsonl"], "none.jsonl"),
        (["--set", "method.target_modules=[nothing]"], "no module of LlamaForCausalLM matches"),
    ],
)
def test_mistakes(lorakit, texts, words, message):
    said = lorakit("train", texts.recipe, "--dry-run", *words)
    assert said.code == 1
    assert message in said.err
    assert said.out == ""


def test_a_single_step_is_measured(lorakit, texts, tmp_path):
    recipe = yaml.safe_load(texts.recipe.read_text()) | {"output": str(tmp_path / "out")}
    recipe["train"]["max_steps"] = 1
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
    found = lorakit("train", tmp_path / "one.yaml", "--dry-run", "--json").json
    assert (found["steps"], len(found["step_seconds"])) == (1, 1)
    assert not (tmp_path / "out").exists()
