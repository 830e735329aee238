"""Models by their shape alone: the published sizes with random weights, for machines without a hub."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from lorakit.models import Loaded, parse_dtype

LABELS = 2


def gpt2_small() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    # transformers' defaults are GPT-2 small; its own dropout is left out, as on the other shapes (which have none)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def gpt2_medium() -> Any:
    """The model of the paper's Table 1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


def _llama(**values: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **values))


def smollm2_135m() -> Any:
    return _llama(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    )


def llama_1b() -> Any:
    """Llama 3.2's 1B."""
    return _llama(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def minilm() -> Any:
    """all-MiniLM-L6 with a classification head over its first token."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **off))


SHAPES: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2-small": ("causal-lm", gpt2_small),
    "gpt2-medium": ("causal-lm", gpt2_medium),
    "smollm2-135m": ("causal-lm", smollm2_135m),
    "llama-1b": ("causal-lm", llama_1b),
    "minilm": ("sequence-classification", minilm),
}
"""Name -> (task, how it is built)."""


def build(name: str, *, dtype: str, device: str | None, seed: int) -> Loaded:
    """The shape `name` with random weights, in eval mode. It has no tokenizer, but says which id pads."""
    task, make = SHAPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    model = model.to(device=device or "cpu", dtype=parse_dtype(dtype)).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    pad = SimpleNamespace(pad_token_id=0, model_max_length=model.config.max_position_embeddings)
    return Loaded(model, pad, name, name, task)
