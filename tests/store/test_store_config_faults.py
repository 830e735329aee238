"""A bad adapter_config.json or lorakit.json: refused, with every fault told at once."""

import json

import pytest
import tiny
import torch
from store_kit import CONFIG, EXTRA, PAIR, TENSORS, edit_json, edit_tensors, good, refused

import lorakit as lk


@pytest.fixture
def folder(tmp_path):
    """A sound folder as PEFT would write it: without a hash that every change would break."""
    made = good(tmp_path / "adapter")
    (made / EXTRA).unlink()
    return made


def test_no_folder_or_a_file_instead(tmp_path):
    refused(tmp_path / "nowhere", "is not there: expected an adapter folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file: expected an adapter folder")


def test_an_empty_folder_lacks_both_files(tmp_path):
    refused(tmp_path, "adapter_config.json: not there", "adapter_model.safetensors: not there")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_names_that_are_no_paths(name):
    with pytest.raises(lk.LorakitError):
        lk.load(tiny.gpt2(), name)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<!DOCTYPE html><html></html>", "a web page"),
        ("", "no JSON"),
        ('{"r": 8,', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("version https://git-lfs.github.com/spec/v1\n", "no JSON"),
        ('{"r": 4}', "no peft_type"),
        ('{"peft_type": "LOHA", "r": 4}', "peft_type 'LOHA'"),
        ('{"peft_type": ["LORA"], "r": 4}', "peft_type ['LORA']"),
    ],
)
def test_a_config_that_is_none(folder, text, fault):
    (folder / CONFIG).write_text(text)
    refused(folder, fault)


def test_a_config_that_is_no_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{}")
    refused(folder, "adapter_config.json: cannot be read")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"r": 0}, "r must be"),
        ({"r": -3}, "r must be"),
        ({"r": "8"}, "r must be a whole number, not '8'"),
        ({"r": 4.0}, "r must be a whole number, not 4.0"),
        ({"r": True}, "r must be"),
        ({"r": None}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": float("inf")}, "alpha must be a finite number"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [3]}, "target_modules must be"),
        ({"target_modules": {"c_attn": 1}}, "target_modules must be"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"exclude_modules": 3}, "exclude_modules must be"),
        ({"exclude_modules": "["}, "no regular expression"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be a number"),
        ({"lora_dropout": 1.5}, "dropout must be a probability"),
        ({"lora_dropout": float("nan")}, "dropout must be a probability"),
        ({"bias": "some"}, "bias must be one of"),
        ({"bias": ["all"]}, "bias must be"),
        ({"use_rslora": "false"}, "use_rslora must be true or false"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"c_attn": "4"}}, "rank_pattern['c_attn'] must be"),
        ({"rank_pattern": {"*": 4}}, "no regular expression"),
        ({"alpha_pattern": {"c_attn": None}}, "c_attn must be a finite number"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform must be"),
        ({"layers_to_transform": [0, 1], "layers_pattern": 3}, "layers_pattern must be"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"use_dora": True}, "lora_magnitude_vector: missing"),
        ({"lora_bias": True}, "lora_B.bias: missing"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "loftq"}, "changed the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_value_that_makes_no_sense(folder, change, fault):
    edit_json(folder / CONFIG, **change)
    assert any(fault in found for found in refused(folder, fault))


def test_all_faults_of_a_config_and_of_the_tensors_are_told_together(folder):
    edit_json(folder / CONFIG, r="8", bias="some", use_qalora=True, lora_dropout=2, rank_pattern={"(": 1})
    (folder / TENSORS).write_bytes(b"")
    (folder / EXTRA).write_text("{")
    refused(
        folder,
        "r must be",
        "bias must be one of",
        "use_qalora",
        "dropout must be",
        "no regular expression",
        "too few",
        "lorakit.json: no JSON",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"a_key_of_next_year": 3},
        {"megatron_core": "x"},
        {"kasa_config": None, "use_bdlora": None},
        {"layers_to_transform": []},
        {"exclude_modules": []},
        {"rank_pattern": None},
        {"peft_version": "0.99"},
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},  # a head's name that this model does not have
        {"init_lora_weights": "eva"},
    ],
    ids=str,
)
def test_what_changes_no_result_is_ignored(folder, change):
    edit_json(folder / CONFIG, **change)
    lk.load(tiny.gpt2(), folder)
    assert lk.verify(folder).ok


def test_ranks_that_are_not_the_configs(folder):
    edit_json(folder / CONFIG, r=8, rank_pattern={"h.1.attn.c_attn": 4})
    refused(folder, "transformer.h.0.attn.c_attn: rank 4 in the file, 8 by adapter_config.json")


def test_modules_that_the_config_names_and_the_file_lacks_and_the_other_way_round(folder):
    edit_json(folder / CONFIG, target_modules=["c_fc", "transformer.h.0.attn.c_attn"])
    refused(
        folder,
        "transformer.h.0.mlp.c_fc: named by target_modules, but the file has no tensors",
        "transformer.h.1.mlp.c_fc: named by target_modules, but the file has no tensors",
        "transformer.h.1.attn.c_attn: in the file, but not named",
    )


def test_targets_that_the_model_does_not_have(folder):
    edit_json(folder / CONFIG, target_modules=["q_proj"])
    refused(folder, "no module of GPT2LMHeadModel matches")


def test_a_head_or_a_bias_that_the_config_promises_and_the_file_lacks(tmp_path):
    folder = good(tmp_path / "a", bias="lora_only", modules_to_save=["ln_f"])
    edit_tensors(folder, drop=[f"{PAIR}.base_layer.bias", "base_model.model.transformer.ln_f.weight"])
    refused(folder, "transformer.h.0.attn.c_attn.bias: trained in full", "transformer.ln_f.weight: trained in full")
    folder = good(tmp_path / "b", bias="all")
    edit_tensors(folder, drop=["base_model.model.transformer.h.1.ln_1.bias"])
    refused(folder, "transformer.h.1.ln_1.bias: trained in full")


@pytest.mark.parametrize("text", ["{", "[]", "<html>", '"x"', "[" * 100_000])
def test_a_broken_lorakit_json(folder, text):
    (folder / EXTRA).write_text(text)
    refused(folder, "lorakit.json")


@pytest.mark.parametrize("value", [2, "1", None, [1]])
def test_a_format_of_the_future(folder, value):
    (folder / EXTRA).write_text(json.dumps({"format": value}))
    refused(folder, "install a newer one")


def test_odd_values_in_lorakit_json_are_only_that(folder):
    (folder / EXTRA).write_text(json.dumps({"adapter": 3, "base": [1]}))
    refused(folder, "names the hash 3", "another base")


def test_a_bf16_adapter_on_a_layer_of_another_kind(folder):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    refused(
        folder,
        "transformer.h.0.attn.c_attn: the model has no such module",
        "transformer.h.1.attn.c_attn: the model has no such module",
        "no module of Sequential matches",
        model=model,
    )
