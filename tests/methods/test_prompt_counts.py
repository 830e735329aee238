"""How many numbers prefixes and prompts train on GPT-3's shape (96 layers, d = 12288), on the meta device: Hu et al. 2021,
tables 4 and 15; prefix-layer by both countings."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.attach.method import Method
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt_embedding import PromptEmbedding
from lorakit.methods.prompt_tuning import PromptTuning
from lorakit.methods.warp import Warp


@pytest.fixture(scope="module")
def gpt3() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    with torch.device("meta"):
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=50257,
                hidden_size=12288,
                word_embed_proj_dim=12288,
                ffn_dim=4 * 12288,
                num_hidden_layers=96,
                num_attention_heads=96,
                max_position_embeddings=2048,
            )
        )


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (PromptEmbedding(256, 8), 3_244_032),
        (PromptEmbedding(32, 8), 491_520),
        (PromptEmbedding(512, 8), 6_389_760),
        (PrefixTuning(8, 8), 37_748_736),  # keys and values (Li & Liang)
        (PrefixTuning(2, 2), 9_437_184),
        (PrefixTuning(64), 150_994_944),
        (PromptTuning(100), 1_228_800),
        (Warp(labels=3, prefix_length=20, infix_length=0, mask_token_id=5), 23 * 12288),
    ],
    ids=repr,
)
def test_on_gpt3(gpt3: nn.Module, method: Method, count: int) -> None:
    lk.attach(gpt3, method)
    counts = lk.count_parameters(gpt3)
    assert counts.inserted == counts.trainable == count
    if isinstance(method, PrefixTuning):  # the paper's formula has one vector for a position's keys and values
        assert counts.inserted // 2 == 96 * 12288 * method.count
        assert method.count != 16 or counts.inserted // 2 == 18_874_368
    lk.detach(gpt3, "default")


@pytest.mark.parametrize(
    ("method", "count"),
    [
        # vectors P d; MLP d h + h, then h * 2 L d + 2 L d
        (PrefixTuning(10, reparametrise=True, hidden=512), 10 * 1024 + 1024 * 512 + 512 + 513 * 2 * 24 * 1024),
        # vectors P d; MLP of three layers
        (PTuning(10, "mlp", hidden=64), 10 * 1024 + (1024 * 64 + 64) + (64 * 64 + 64) + (64 * 1024 + 1024)),
        # two layers of an LSTM both ways (4 gates, two biases), then 2h -> 2h -> d
        (
            PTuning(10, "lstm", hidden=64),
            10 * 1024
            + 2 * 4 * 64 * (1024 + 64 + 2)
            + 2 * 4 * 64 * (128 + 64 + 2)
            + (128 * 128 + 128)
            + (128 * 1024 + 1024),
        ),
    ],
    ids=repr,
)
def test_what_is_trained_beside_them(method: Method, count: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert lk.attach(model, method).trainable == count
