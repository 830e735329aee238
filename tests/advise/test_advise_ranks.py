"""Advice from a spectrum: an adapter whose layers have ranks made by hand."""

import json

import pytest
import tiny
import torch
import yaml

import lorakit as lk
from lorakit.advise.ranks import advise_ranks
from lorakit.cli import main
from lorakit.errors import FileError, UsageError
from lorakit.run.recipe import load_recipe

RANKS = {"q_proj": 1, "v_proj": 3}


@pytest.fixture
def adapter(tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=4, alpha=6, target_modules=list(RANKS)), name="a", seed=0)
    with torch.no_grad():
        for path, module in model.named_modules():
            kind = path.rpartition(".")[2]
            if kind in RANKS:
                rows = torch.linalg.qr(torch.randn(module.lora_A.shape[1], 4)).Q.t()
                columns = torch.linalg.qr(torch.randn(module.lora_Bt.shape[1], 4)).Q.t()
                weights = torch.tensor([1.0, 0.5, 0.25, 0.125]) * (torch.arange(4) < RANKS[kind])
                module.lora_A.copy_(rows)
                module.lora_Bt.copy_(columns * weights[:, None])
    return lk.save(model, tmp_path / "adapter", "a")


def test_the_rank_that_was_made_is_found(adapter):
    found = advise_ranks(adapter, 1.0)
    assert {(one.path.rpartition(".")[2], one.advised) for one in found.layers} == set(RANKS.items())
    assert found.parameters_after < found.parameters_before
    assert found.parameters_before == sum(4 * one.parameters for one in found.layers)
    assert not any(one.full for one in found.layers)


def test_a_share_is_kept_by_the_smallest_rank(adapter):
    # squares of 1, 1/2, 1/4: 16, 4 and 1 of 21
    for share, wanted in ((16 / 21 - 1e-3, 1), (16 / 21 + 1e-3, 2), (20 / 21 + 1e-3, 3)):
        found = advise_ranks(adapter, share)
        values = [one for one in found.layers if one.path.endswith("v_proj")]
        assert [one.advised for one in values] == [wanted] * 2
        assert all(one.kept >= share for one in values)


def test_the_yaml_is_a_recipes_and_keeps_the_scaling(adapter):
    found = advise_ranks(adapter, 1.0)
    document = {"model": "m", "data": {"train": "t"}, **yaml.safe_load(found.yaml())}
    document["method"]["target_modules"] = list(RANKS)
    method = load_recipe(document).method
    for one in found.layers:
        assert method.rank(one.path) == one.advised
        assert method.scaling(one.path) == pytest.approx(6 / 4)
    model = tiny.llama()
    report = lk.attach(model, method, name="new")
    assert report.trainable == found.parameters_after


def test_an_untrained_adapter_says_nothing(tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=4, target_modules=["q_proj"]), name="a")
    with pytest.raises(UsageError, match="never trained"):
        advise_ranks(lk.save(model, tmp_path / "fresh", "a"))


def test_bad_input_is_told(adapter):
    for share in (0, 1.5, True, "all"):
        with pytest.raises(UsageError):
            advise_ranks(adapter, share)
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(FileError):
        advise_ranks(adapter)


def test_the_command(adapter, capsys):
    with pytest.raises(SystemExit) as left:
        main(["analyze", str(adapter), "--advise", "--energy", "0.9"])
    assert left.value.code == 0
    assert "r:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["analyze", str(adapter), "--advise", "--json"])
    assert yaml.safe_load(json.loads(capsys.readouterr().out)["yaml"])["method"]["r"] in (1, 3)
    for wrong in (["--budget", "5"], ["--advise", "--base", "x"]):
        with pytest.raises(SystemExit) as left:
            main(["analyze", str(adapter), *wrong])
        assert left.value.code == 1


def test_parts_of_a_fused_matrix_have_the_rank_that_one_of_them_needs(tmp_path):
    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=3, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]}), name="a")
    with torch.no_grad():
        for layer in model.transformer.h:
            A, Bt = layer.attn.c_attn.lora_A, layer.attn.c_attn.lora_Bt
            trained = A.numel() + Bt.numel()
            Bt.normal_()
            for row in (1, 2, 4, 5):  # of each part one direction is left
                A[row] = 0
    found = advise_ranks(lk.save(model, tmp_path / "parts", "a"), 1.0)
    assert [(one.rank, one.advised) for one in found.layers] == [(3, 1)] * 2
    assert found.parameters_before == 2 * trained
    assert (found.r, found.rank_pattern) == (1, {})


def test_a_start_from_the_base_does_not_count_as_trained(tmp_path):
    model = tiny.llama()
    report = lk.attach(model, lk.LoRA(r=2, init="pissa", target_modules=["q_proj"]), name="a", seed=0)
    with torch.no_grad():
        for tensor in lk.parameters(model, "a"):
            tensor.add_(torch.randn_like(tensor))
    found = advise_ranks(lk.save(model, tmp_path / "pissa", "a"), 1.0)
    assert found.parameters_before == report.trainable
    assert all((one.rank, one.advised) == (2, 4) for one in found.layers)
