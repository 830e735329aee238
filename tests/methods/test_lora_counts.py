"""Numbers of parameters of the paper's models, on the meta device (Hu et al. 2021, tables 2 to 4)."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk


def build(kind: str, **config: Any) -> nn.Module:
    import transformers

    with torch.device("meta"):
        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config.pop("config"))(**config))
    return model


def roberta(size):
    shape = {
        "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    }[size]
    return build(
        "RobertaForSequenceClassification",
        config="RobertaConfig",
        vocab_size=50265,
        type_vocab_size=1,
        max_position_embeddings=514,
        **shape,
    )


def deberta_xxl():
    return build(
        "DebertaV2ForSequenceClassification",
        config="DebertaV2Config",
        vocab_size=128100,
        hidden_size=1536,
        num_hidden_layers=48,
        num_attention_heads=24,
        intermediate_size=6144,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )


def decoder(layers, width, heads):
    """GPT-2 and GPT-3 as the paper adapts them, Wq and Wv apart. GPT-2's own c_attn is one fused matrix, so the shape is
    OPT's, which has a q_proj and a v_proj."""
    return build(
        "OPTForCausalLM",
        config="OPTConfig",
        vocab_size=50257,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        max_position_embeddings=1024,
        word_embed_proj_dim=width,
    )


CASES = {
    "roberta-base r=8": (lambda: roberta("base"), 8, ["query", "value"], 294_912),
    "roberta-large r=8": (lambda: roberta("large"), 8, ["query", "value"], 786_432),
    "deberta-xxl r=16": (deberta_xxl, 16, ["query_proj", "value_proj"], 4_718_592),
    "gpt2-medium r=4": (lambda: decoder(24, 1024, 16), 4, ["q_proj", "v_proj"], 393_216),
    "gpt2-large r=4": (lambda: decoder(36, 1280, 20), 4, ["q_proj", "v_proj"], 737_280),
    "gpt3 r=1": (lambda: decoder(96, 12288, 96), 1, ["q_proj", "v_proj"], 4_718_592),
    "gpt3 r=4": (lambda: decoder(96, 12288, 96), 4, ["q_proj", "v_proj"], 18_874_368),
    "gpt3 r=8": (lambda: decoder(96, 12288, 96), 8, ["q_proj", "v_proj"], 37_748_736),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_of_the_paper(case):
    make, rank, targets, expected = CASES[case]
    model = make()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    base = sum(p.numel() for p in model.parameters())
    report = lk.attach(model, lk.LoRA(r=rank, target_modules=targets), name="a")
    counts = lk.count_parameters(model)
    assert (report.trainable, report.total) == (expected, base + expected)
    assert (counts.low_rank, counts.replaced, counts.trainable, counts.total) == (
        expected,
        0,
        expected,
        base + expected,
    )
    lk.detach(model, "a")
    assert lk.count_parameters(model).total == base


def test_the_head_is_trained_but_not_low_rank():
    model = roberta("base")
    head = sum(p.numel() for p in model.classifier.parameters())
    lk.attach(model, lk.LoRA(r=8, target_modules=["query", "value"], modules_to_save=["classifier"]), name="a")
    counts = lk.count_parameters(model)
    assert (counts.low_rank, counts.replaced, counts.trainable) == (294_912, head, 294_912 + head)


def test_counts_follow_what_is_on():
    model = tiny.llama()
    base = sum(p.numel() for p in model.parameters())
    plain = lk.count_parameters(model)
    assert (plain.trainable, plain.total, plain.low_rank, plain.replaced) == (base, base, 0, 0)
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj"]), name="a")
    lk.attach(model, lk.LoRA(r=3, target_modules=["q_proj"]), name="b", trainable=False)
    per_rank = 2 * (32 + 32)
    for names, trainable, low_rank in (("a", 2, 2), ("b", 0, 3), ({"a": 1.0, "b": 1.0}, 2, 5), (None, 0, 0)):
        lk.use(model, names)
        counts = lk.count_parameters(model)
        assert (counts.trainable, counts.low_rank) == (trainable * per_rank, low_rank * per_rank)
        assert counts.total == base + low_rank * per_rank
    assert [info.parameters for info in lk.adapters(model).values()] == [2 * per_rank, 3 * per_rank]
