"""MRPC from the adapter of MNLI, as the paper trains it: the low-rank part is carried over, the head is not."""

from __future__ import annotations

import pytest
import torch
from recipe_kit import CASES, RECIPES
from safetensors.torch import load_file

from lorakit.errors import FileError, LorakitError, RecipeError
from lorakit.run.train import train


@pytest.fixture
def mnli(run_recipe, tmp_path):
    """A run of MNLI's recipe; returns its folder."""
    return run_recipe("roberta-mnli", f"output={tmp_path / 'mnli'}", "train.lr=0.01").folder


def tensors(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def mrpc(tmp_path, *overrides, **options):
    (tmp_path / "mrpc_data").mkdir(exist_ok=True)
    data = CASES["roberta-mrpc"].write(tmp_path / "mrpc_data")
    places = [f"data.{key}={path}" for key, path in data.items()]
    fixed = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'mrpc'}", "train.max_steps=1"]
    return train(RECIPES / "roberta-mrpc.yaml", overrides=[*fixed, *places, *overrides], **options)


def test_the_low_rank_part_is_carried_over_and_the_head_is_not(mnli, tmp_path):
    # a step so small that float32 does not see it: what is saved is what training began with
    run = mrpc(tmp_path, f"start_from={mnli}", "train.lr=1e-30")
    before, after = tensors(mnli), tensors(run.folder)
    low_rank = [key for key in before if ".lora_" in key]
    assert len(low_rank) == 8
    for key in low_rank:
        assert torch.equal(before[key], after[key]), key
    assert any(before[key].abs().sum() > 0 for key in low_rank if "lora_B" in key)
    heads = {key: tensor.shape[0] for key, tensor in after.items() if key.endswith("out_proj.weight")}
    assert set(heads.values()) == {2}
    afresh = mrpc(tmp_path, "start_from=null", "train.lr=1e-30", overwrite=True)
    for key, tensor in tensors(afresh.folder).items():
        if "lora_A" in key:
            continue  # both runs drew the same A, which two steps hardly move
        assert (".lora_" not in key) == torch.allclose(tensor, after[key], atol=1e-20), key  # the same head is drawn


def test_scores_start_from_three_classes_too(mnli, tmp_path):
    header = [
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ]
    rows = [[n, "g", "f", 1, 1, "a", "b", "a cat", "the sun", f"{n % 5}.{n % 3}"] for n in range(12)]
    place = tmp_path / "stsb.tsv"
    place.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]))
    places = [f"data.train={place}", f"data.eval={place}", "data.format=glue:stsb", "train.best_metric=pearson"]
    run = mrpc(tmp_path, f"start_from={mnli}", "train.lr=1e-30", *places)
    before, after = tensors(mnli), tensors(run.folder)
    assert all(torch.equal(before[key], after[key]) for key in before if ".lora_" in key)
    assert {tensor.shape[0] for key, tensor in after.items() if key.endswith("out_proj.weight")} == {1}
    assert {"pearson", "spearman"} <= set(run.summary["after"])


def test_a_run_that_goes_on_does_not_begin_again(mnli, tmp_path):
    steady = (f"start_from={mnli}", "train.schedule=constant", "train.warmup=1")
    whole = tensors(mrpc(tmp_path, *steady, "train.max_steps=2").folder)
    mrpc(tmp_path, *steady, "train.max_steps=1", overwrite=True)
    again = tensors(mrpc(tmp_path, *steady, "train.max_steps=2", resume=True).folder)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (["method.r=4", "method.alpha=4"], RecipeError, r"\(8, 32\) there, \(4, 32\) here"),
        (["method.alpha=16"], RecipeError, "scaling 1 there, 2 here"),
        (["method.target_modules=[query]"], RecipeError, "value.* there, not here"),
        (["start_from=nowhere/at/all"], LorakitError, "nowhere/at/all"),
    ],
)
def test_what_does_not_fit_is_said(changes, error, said, mnli, tmp_path):
    with pytest.raises(error, match=said):
        mrpc(tmp_path, f"start_from={mnli}", *changes)


def test_an_adapter_of_another_base_or_damaged_is_refused(mnli, tmp_path):
    import runs
    import tiny

    other = tmp_path / "other"
    runs.save_model(other, lambda **changes: tiny.roberta(**changes, max_position_embeddings=512, hidden_act="relu"))
    weights = other / "model.safetensors"
    from safetensors.torch import save_file

    save_file({key: tensor + 0.5 for key, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(FileError, match="another base"):
        mrpc(tmp_path, f"start_from={mnli}", f"model={other}")
    file = mnli / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FileError, match="cannot be begun from"):
        mrpc(tmp_path, f"start_from={mnli}")
