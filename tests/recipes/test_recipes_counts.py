"""The recipes' own methods on their real models' shapes (meta device): the parameter counts that the sources print."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipe_kit import RECIPES
from torch import nn

import lorakit as lk
from lorakit.run.recipe import load_recipe

ENCODER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
XXL = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "relative_attention": True,
    "position_buckets": 256,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
}
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
GPT3 = {
    "vocab_size": 50257,
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "ffn_dim": 49152,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "max_position_embeddings": 2046,  # OPT has two positions more
}
COUNTS = {
    # Hu et al. 2021, tables 2, 3 and 15; alpaca-lora prints 16,777,216; PEFT's ViT example 667,493 with its head of 101.
    "roberta-mnli": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER, 294_912),
    "roberta-mrpc": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER, 294_912),
    "deberta-v2-cola": ("DebertaV2ForSequenceClassification", "DebertaV2Config", XXL, 4_718_592),
    "gpt2-e2e": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 393_216),
    "gpt3-wikisql": ("OPTForCausalLM", "OPTConfig", GPT3, 18_874_368),
    "llama-alpaca": ("LlamaForCausalLM", "LlamaConfig", LLAMA, 16_777_216),
    "vit-images": ("ViTForImageClassification", "ViTConfig", {"num_labels": 101}, 667_493 - 101 * 769),
}


def on_meta(model: str, config: str, values: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.device("meta"):
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**values))
    return built


@pytest.mark.parametrize("name", COUNTS)
def test_a_recipe_trains_as_many_parameters_as_its_source_prints(name):
    *kind, expected = COUNTS[name]
    model = on_meta(*kind)
    lk.attach(model, load_recipe(RECIPES / f"{name}.yaml").method, name="a")
    assert lk.count_parameters(model).low_rank == expected


def test_gpt3s_shape_is_that_of_the_paper():
    model = on_meta("OPTForCausalLM", "OPTConfig", GPT3)
    base = lk.count_parameters(model).total
    assert base == 174_604_259_328
    lk.attach(model, load_recipe(RECIPES / "gpt3-wikisql.yaml").method, name="a")
    assert round(base / lk.count_parameters(model).trainable) == 9_251  # "10,000 times" fewer
    assert lk.count_parameters(model).trainable * 2 == 37_748_736  # "35 MB" in half precision
