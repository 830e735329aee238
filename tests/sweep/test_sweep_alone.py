"""Each member of a sweep is what training it alone gives: every loss, the gradient's norms, the adapter, the metrics."""

import json

import pytest
import runs
import torch
from safetensors.torch import load_file

from lorakit.run.train import train
from lorakit.sweep.api import sweep

VARIED = {
    "llama": [
        {"method.r": 1, "train.lr": 1e-3, "train.schedule": "cosine"},
        {"method.target_modules": ["q_proj", "o_proj", "down_proj"], "train.clip": 0.05},
        {"method.target_modules": "all-linear", "method.alpha": 2, "train.seed": 3},
    ],
    "gpt2": [
        {"method.r": 2},
        {"train.seed": 5, "method.target_modules": ["c_attn", "c_fc"], "train.weight_decay": 0.1},
    ],
    "bert": [
        {"method.r": 2},
        {"train.seed": 7, "method.target_modules": ["dense"]},
        {"method.bias": "all", "train.max_steps": 12},
    ],
    "t5": [{"method.r": 2}, {"train.seed": 5, "train.max_steps": 10}],
}


@pytest.mark.parametrize("model", list(VARIED))
def test_a_member_is_a_run_of_its_own(model, recipe, tmp_path):
    document = recipe(model)
    found = sweep(document, variants=VARIED[model], output=tmp_path / "sweep")
    for i, one in enumerate(found.members):
        changes = [f"{key}={json.dumps(value)}" for key, value in VARIED[model][i].items()]
        alone = train(document, overrides=[*changes, f"output={tmp_path / f'alone{i}'}"])
        check_same(tmp_path / "sweep" / one.name, alone.folder)
        assert one.parameters == alone.summary["trainable_parameters"]
        assert one.after == pytest.approx(alone.summary["after"])
        assert one.failed is None
        assert one.steps == alone.summary["steps"] >= 10


def check_same(ours, theirs):
    mine, other = (runs.read_rows(folder / "metrics.jsonl") for folder in (ours, theirs))
    assert [row["step"] for row in mine] == [row["step"] for row in other]
    for one, two in zip(mine, other, strict=True):
        for key in ("loss", "lr", "grad_norm", "epoch", "eval_loss"):
            assert (key in one) == (key in two)
            assert one.get(key, 0.0) == pytest.approx(
                two.get(key, 0.0), abs=1e-5, rel=1e-4 if key == "grad_norm" else 0
            )
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-3, atol=2e-4)
