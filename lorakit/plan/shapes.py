"""Models whose shapes are known by a short name, so that planning needs neither files nor a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    model_type: str
    """transformers' name of the architecture ("gpt2", "llama")."""
    config: Mapping[str, Any]
    """What differs from that architecture's default configuration."""
    task: str = "causal-lm"
    """A key of lorakit.models.TASKS."""
    dtype: str = "float32"
    """How its weights usually stand in training; a key of lorakit.models.DTYPES."""
    printed_total: int | None = None
    """The number of parameters that the LoRA paper prints, where it is another than the shape's."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The LoRA paper's figures for it, in bytes (section 4.2; the hundred models: footnote 4)."""


def _gpt2(layers: int, width: int, heads: int, **more: Any) -> Shape:
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return Shape("gpt2", {"n_layer": layers, "n_embd": width, "n_head": heads, **off}, **more)


def _encoder(model_type: str, layers: int, width: int, heads: int, inner: int, **config: Any) -> Shape:
    sides = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return Shape(model_type, {**sides, **config}, task="sequence-classification")


def _decoder(
    model_type: str, layers: int, width: int, heads: int, inner: int, dtype: str = "bfloat16", **config: Any
) -> Shape:
    sides = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return Shape(model_type, {"num_key_value_heads": heads, **sides, **config}, dtype=dtype)


_ROBERTA = {"vocab_size": 50265, "type_vocab_size": 1, "max_position_embeddings": 514, "pad_token_id": 1}
_DEBERTA = {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
_SMOL = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_SMOLLM2_135M = _decoder("llama", 30, 576, 9, 1536, "float32", num_key_value_heads=3, **_SMOL)
_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_QWEN2 = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}

SHAPES: dict[str, Shape] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-175b": Shape(
        "gpt2",
        {**_gpt2(96, 12288, 96).config, "n_positions": 2048},
        dtype="float16",
        printed_total=175_255_800_000,
        paper={"full": 1.2e12, "lora": 350e9, "full_100": 35e12, "lora_100": 354e9},
    ),
    "roberta-base": _encoder("roberta", 12, 768, 12, 3072, **_ROBERTA),
    "roberta-large": _encoder("roberta", 24, 1024, 16, 4096, **_ROBERTA),
    "bert-base": _encoder("bert", 12, 768, 12, 3072),
    "bert-large": _encoder("bert", 24, 1024, 16, 4096),
    "deberta-xxl": _encoder("deberta-v2", 48, 1536, 24, 6144, **_DEBERTA),
    "minilm-l6": _encoder("bert", 6, 384, 12, 1536),
    "t5-base": Shape(
        "t5",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
        task="seq2seq",
    ),
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-135m-instruct": _SMOLLM2_135M,
    "smollm2-360m": _decoder("llama", 32, 960, 15, 2560, "float32", num_key_value_heads=5, **_SMOL),
    "smollm2-1.7b": _decoder("llama", 24, 2048, 32, 8192, **_SMOL),
    "llama-7b": _decoder("llama", 32, 4096, 32, 11008, vocab_size=32000, max_position_embeddings=4096),
    "llama-13b": _decoder("llama", 40, 5120, 40, 13824, vocab_size=32000, max_position_embeddings=4096),
    "llama3-8b": _decoder("llama", 32, 4096, 32, 14336, **_LLAMA3),
    "llama3-70b": _decoder("llama", 80, 8192, 64, 28672, **_LLAMA3),
    "mistral-7b": _decoder("mistral", 32, 4096, 32, 14336, vocab_size=32000, num_key_value_heads=8),
    "qwen2.5-0.5b": _decoder("qwen2", 24, 896, 14, 4864, num_key_value_heads=2, **_QWEN2),
    "qwen2.5-7b": _decoder(
        "qwen2", 28, 3584, 28, 18944, num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768
    ),
}
