"""Two short runs on the packaged models."""

import pytest
import runs
import yaml


@pytest.mark.weights
def test_smollm2_learns_a_little(lorakit, tmp_path):
    recipe = {
        "model": "smollm2-135m-instruct",
        "data": {"train": runs.write_rows(tmp_path / "train.jsonl", runs.text_rows(8))},
        "method": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "train": {"batch_size": 2, "max_steps": 4, "lr": 3e-3, "schedule": "constant", "warmup": 0},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert lorakit("train", tmp_path / "recipe.yaml").code == 0
    losses = [row["loss"] for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert min(losses[1:]) < losses[0]
    assert lorakit("generate", tmp_path / "run", "--prompt", "red dog >", "--max-new-tokens", 4).out.strip()


@pytest.mark.weights
def test_minilm_tells_two_kinds_apart(lorakit, tmp_path):
    rows = [{"text": f"{word} {kind}", "label": kind} for word in runs.WORDS for kind in ("good", "bad")]
    data = {name: runs.write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "eval")}
    recipe = {
        "model": "minilm-l6",
        "task": "sequence-classification",
        "data": data,
        "train": {"epochs": 3, "lr": 3e-3, "best_metric": "accuracy"},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = lorakit("train", tmp_path / "recipe.yaml", "--json")
    assert said.code == 0
    assert said.json["after"]["accuracy"] > 0.9
    assert lorakit("evaluate", tmp_path / "run", "--json").json["metrics"] == said.json["after"]
