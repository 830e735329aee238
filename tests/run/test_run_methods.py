"""Recipes with methods other than LoRA, alone and several together, from YAML to a run's folder and back."""

import json
import os
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from transformers import GPT2Config

import lorakit as lk
from lorakit.attach.method import Several
from lorakit.errors import FileError, RecipeError
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lora import LoRA
from lorakit.methods.table import METHODS
from lorakit.run.listen import Listener
from lorakit.run.rate import settings_on
from lorakit.run.recipe import load_recipe, to_mapping, to_yaml
from lorakit.run.subject import adapter_folder, open_subject

MINIMAL = {"model": "m", "data": {"train": "t.jsonl"}}
OTHERS = ("full", "bitfit", "houlsby", "lin", "pfeiffer", "adapter-drop", "residual-adapter")


@pytest.mark.parametrize(
    "method",
    [
        {"name": "houlsby", "r": 4, "attention": ["o_proj"], "modules_to_save": ["score"]},
        {"name": "full", "top_layers": 2},
        {"name": "residual-adapter", "kind": "series", "r": 3},
        [{"name": "lora", "r": 2}, {"name": "lin", "activation": "gelu"}],
    ],
)
def test_methods_go_to_yaml_and_back(tmp_path: Any, method: Any) -> None:
    recipe = load_recipe({**MINIMAL, "method": method})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(to_mapping(recipe)) == recipe
    assert isinstance(recipe.method, Several) == isinstance(method, list)


def test_every_method_is_known_by_its_name_and_has_defaults_but_those_it_needs() -> None:
    assert set(OTHERS) <= set(METHODS)
    for name in OTHERS:
        assert load_recipe({**MINIMAL, "method": {"name": name}}).method == METHODS[name]()
    assert load_recipe({**MINIMAL, "method": [{"name": "houlsby", "r": 2}]}).method == HoulsbyAdapter(r=2)


def test_a_learning_rate_that_is_not_named_follows_from_method_and_width() -> None:
    def rate(width: int = 2048, **document: Any) -> float:
        model = SimpleNamespace(config=GPT2Config(n_embd=width, n_head=1))
        return settings_on(load_recipe({**MINIMAL, **document}), model).rate

    assert rate() == LoRA.learning_rate == 2e-4
    assert rate(4096) == 1e-4
    assert rate(65536) == 1e-4
    assert rate(768) == pytest.approx(2e-4 * 2048 / 768, rel=0.02)
    assert rate(64) == 1e-3
    assert rate(method={"name": "full"}) == METHODS["full"].learning_rate == rate() / 10
    assert rate(4096, method={"name": "bitfit"}, train={"epochs": 2}) == METHODS["bitfit"].learning_rate / 2
    assert rate(method={"name": "prompt-tuning"}) == METHODS["prompt-tuning"].learning_rate > 2e-4
    assert rate(64, method={"name": "full"}, train={"lr": 1}) == 1
    assert rate(method=[{"name": "lora"}, {"name": "full"}]) == METHODS["full"].learning_rate
    without = SimpleNamespace(config={"in_channels": 4})  # diffusers' models
    assert settings_on(load_recipe(MINIMAL), without).rate == 2e-4


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "houlsbi"}, r"method: expected keys with `name: .*got 'houlsbi' \(did you mean 'houlsby'\?\)"),
        ({"name": "houlsby", "rank": 4}, "method.rank: unknown key"),
        ({"name": "houlsby", "r": 0}, "r must be a whole number"),
        ([{"name": "lora"}, {"name": "bitfits"}], r"method\[1\]: expected keys"),
        ([{"name": "lora"}, {"name": "lora"}], "one method of a kind"),
        ([], "at least two methods"),
        ([[{"name": "lora"}, {"name": "lin"}], {"name": "houlsby"}], "no other combination"),
        (["houlsby"], r"method\[0\]: expected keys"),
        ("houlsby", "expected keys with `name:"),
        ({"name": ["houlsby"]}, "expected keys with `name:"),
    ],
)
def test_methods_that_are_none(method: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe({**MINIMAL, "method": method})


def made(recipe: Any, method: Any, task: str = "causal-lm", **changes: Any) -> dict[str, Any]:
    return {**recipe(task, **changes), "method": method}


class Interrupt(Listener):
    """Presses Ctrl-C when the row of a step comes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def row(self, row: Any, total_steps: int) -> None:
        if row["step"] == self.step and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)


METHODS_TO_RUN = {
    "full": {"name": "full"},
    "top": {"name": "full", "top_layers": 1},
    "houlsby": {"name": "houlsby", "r": 2},
    "lin": {"name": "lin", "r": 2},
    "pfeiffer": {"name": "pfeiffer", "r": 2},
    "adapter-drop": {"name": "adapter-drop", "r": 2, "drop": 1},
    "residual-adapter": {"name": "residual-adapter"},
    "lora+houlsby": [{"name": "lora", "r": 2}, {"name": "houlsby", "r": 2}],
}


@pytest.mark.parametrize("name", METHODS_TO_RUN)
def test_a_run_trains_saves_and_is_opened_again(recipe: Any, name: str) -> None:
    result = lk.train(made(recipe, METHODS_TO_RUN[name], train={"lr": 1e-2, "epochs": 2}))
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["trainable_parameters"] > 0
    assert summary["adapter_bytes"] > 4 * summary["trainable_parameters"]
    losses = [row["eval_loss"] for row in runs.read_rows(result.folder / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert lk.verify(adapter_folder(result.folder)).ok
    subject = open_subject(result.folder)
    ids = torch.arange(5, 12)[None]
    result.model.eval()
    with torch.no_grad():
        assert torch.equal(subject.model(ids).logits, result.model(ids).logits)


@pytest.mark.parametrize("method", [{"name": "bitfit"}, {"name": "pfeiffer"}, [{"name": "lora"}, {"name": "bitfit"}]])
def test_a_classifiers_head_is_trained_beside_every_method(recipe: Any, method: Any) -> None:
    result = lk.train(made(recipe, method, "sequence-classification"))
    found = lk.inspect(adapter_folder(result.folder))
    assert "classifier.out_proj.weight" in found.replaced
    assert open_subject(result.folder).label_names == ["neg", "pos", "so"]


def test_the_pruned_last_block_gives_the_same_losses(recipe: Any, tmp_path: Any) -> None:
    for name in ("houlsby", "lin"):
        rows = []
        for pruned in (True, False):
            train = {"prune_last_block": pruned, "max_steps": 3, "packing": False}
            document = made(recipe, METHODS_TO_RUN[name], "sequence-classification", train=train)
            document["model"] = no_dropout(document["model"], tmp_path / "still")
            result = lk.train({**document, "output": str(tmp_path / f"{name}{pruned}")})
            rows.append([row["loss"] for row in runs.read_rows(result.folder / "metrics.jsonl") if "loss" in row])
        assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def no_dropout(model: str, folder: Any) -> str:
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", ["houlsby", "full", "lora+houlsby"])
def test_a_stopped_run_goes_on_to_the_same_bytes(recipe: Any, tmp_path: Any, name: str) -> None:
    document = made(recipe, METHODS_TO_RUN[name])
    whole = lk.train({**document, "output": str(tmp_path / "whole")})
    lk.train(document, listener=Interrupt(3))
    parts = lk.train(document, resume=True)
    there = {path.relative_to(whole.folder) for path in (whole.folder / "adapter").rglob("*.safetensors")}
    assert there
    for path in there:
        assert (whole.folder / path).read_bytes() == (parts.folder / path).read_bytes()


def test_a_run_cannot_begin_from_what_is_no_lora(recipe: Any, tmp_path: Any) -> None:
    first = lk.train(made(recipe, METHODS_TO_RUN["houlsby"]))
    with pytest.raises(FileError, match="cannot be begun from"):
        lk.train({**recipe(), "output": str(tmp_path / "next"), "start_from": str(first.folder)})


@pytest.mark.parametrize("method", [{"name": "warp"}, [{"name": "warp"}, {"name": "lora"}]])
def test_a_recipe_with_warp_is_refused_before_anything_loads(method: Any) -> None:
    with pytest.raises(RecipeError, match="language-model head"):
        lk.train({**MINIMAL, "task": "sequence-classification", "method": method})
