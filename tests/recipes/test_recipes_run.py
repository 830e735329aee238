"""Every recipe under recipes/ runs as it stands, on a tiny model of its family."""

from __future__ import annotations

import math

import pytest
import runs
import torch
import yaml
from peft import PeftModel
from recipe_kit import CASES, RECIPES

import lorakit as lk
from lorakit.run.export import export_merged
from lorakit.run.measure import evaluate_subject
from lorakit.run.recipe import load_recipe
from lorakit.run.subject import open_subject

OTHERS = {"chat", "classification", "prompt-completion"}  # on packaged models: tests/cli


def test_every_recipe_has_its_test():
    named = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("text-to-image", "compare-"))}
    assert named == set(CASES) | OTHERS


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_says_what_it_expects(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    comments = text.partition("\nmodel:")[0].splitlines()
    assert all(line.startswith("# ") for line in comments)
    assert [word for line in comments for word in ("# Data: ", "# Values: ") if line.startswith(word)] == [
        "# Data: ",
        "# Values: ",
    ]
    assert load_recipe(RECIPES / f"{name}.yaml").output == f"runs/{name}"


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_trains_measures_and_merges(name, run_recipe, tmp_path):
    result = run_recipe(name)
    document = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    method = document["method"]
    info = lk.adapters(result.model)["default"]
    assert (info.method.r, info.method.alpha) == (method["r"], method["alpha"])
    adapted = {path.rpartition(".")[2] for path in info.modules if _has_pair(result.model, path)}
    assert adapted == set(method["target_modules"])

    steps = [row for row in runs.read_rows(result.folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert all(pair.abs().sum() > 0 for name, pair in result.model.named_parameters() if "lora_B" in name)

    metric = CASES[name].metric
    assert metric is None or metric in result.summary["after"]
    if metric is not None:
        data = load_recipe(result.folder / "recipe.yaml").data
        subject = open_subject(result.folder)
        again = evaluate_subject(
            subject,
            data.test or data.eval,
            data=data,
            metrics=[metric],
            config=load_recipe(result.folder / "recipe.yaml").generate,
        )
        assert again.metrics[metric] == result.summary["after"][metric]
    export = export_merged(open_subject(result.folder), tmp_path / "merged")
    assert export.max_logit_difference < 1e-4
    merged = open_subject(model=str(tmp_path / "merged"), task=document["task"])
    probe = _probe(document["task"])
    with torch.no_grad():
        ours, theirs = result.model.float()(**probe)[0], merged.model(**probe)[0]  # logits, of an answer's start
    torch.testing.assert_close(theirs, ours, atol=_rounding(document), rtol=0)


@pytest.mark.parametrize("name", ["gpt2-e2e", "deberta-rte", "vit-images", "t5-summaries"])
def test_peft_reads_what_a_recipe_left(name, run_recipe):
    from lorakit.models import load

    result = run_recipe(name)
    task = load_recipe(result.folder / "recipe.yaml").task
    labels = {"label_names": open_subject(result.folder).label_names} if "classification" in task else {}
    base = load(load_recipe(result.folder / "recipe.yaml").model, task=task, **labels).model
    theirs, probe = PeftModel.from_pretrained(base, result.folder / "adapter").eval(), _probe(task)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**probe).logits, result.model(**probe).logits, atol=1e-5, rtol=0)


def test_the_alpaca_recipe_learns_the_output_alone(run_recipe, tmp_path):
    from lorakit.data import encode, load_examples
    from lorakit.models import load

    run_recipe("llama-alpaca")
    examples = load_examples(str(tmp_path / "data" / "alpaca_data.json"), format="alpaca").examples
    tokenizer = load(str(tmp_path / "model")).tokenizer
    bare, given = (encode(one, tokenizer, task="causal-lm", max_length=None) for one in examples[:2])
    for row, example in ((bare, examples[0]), (given, examples[1])):
        prompt = tokenizer.decode([i for i, label in zip(row.input_ids, row.labels, strict=True) if label == -100])
        answer = [label for label in row.labels if label != -100]
        assert prompt.endswith("### Response:")
        assert prompt.startswith("Below is an instruction")
        assert tokenizer.decode(answer[:-1]) == example.completion
        assert answer[-1] == tokenizer.eos_token_id
    assert "### Input:" not in tokenizer.decode(bare.input_ids)
    assert "### Input:" in tokenizer.decode(given.input_ids)


def _has_pair(model: torch.nn.Module, path: str) -> bool:
    return any(name.startswith("lora_B") for name, _ in model.get_submodule(path).named_parameters())


def _rounding(document: dict) -> float:
    """Merging into a bfloat16 base rounds each weight once."""
    return 5e-2 if document.get("base", {}).get("dtype") == "bfloat16" else 1e-4


def _probe(task: str) -> dict[str, torch.Tensor]:
    if task == "image-classification":
        return {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(3))
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return probe | {"decoder_input_ids": ids[:, :4]} if task == "seq2seq" else probe
