"""Tiny models of five families for the tests: two layers, 32 wide, eval mode, fp32, fixed seed; nothing is fetched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB = 96
LABELS = 3
SEED = 1234


def gpt2(**changes: Any) -> nn.Module:
    """GPT-2 with a language-model head: Conv1D projections, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _built(GPT2LMHeadModel, GPT2Config(**(values | changes)))


def roberta(**changes: Any) -> nn.Module:
    """RoBERTa with a head of three classes."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    values = _encoder() | {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1}
    return _built(RobertaForSequenceClassification, RobertaConfig(**(values | changes)))


def bert(**changes: Any) -> nn.Module:
    """BERT with a head of three classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return _built(BertForSequenceClassification, BertConfig(**(_encoder() | changes)))


def deberta(**changes: Any) -> nn.Module:
    """DeBERTa-v2 with relative attention and a head of three classes."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    relative = {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
        "position_biased_input": False,
    }
    return _built(DebertaV2ForSequenceClassification, DebertaV2Config(**(_encoder() | relative | changes)))


def deberta_v1(**changes: Any) -> nn.Module:
    """DeBERTa (v1), query, key and value in one matrix, with relative attention and a head of three classes."""
    from transformers import DebertaConfig, DebertaForSequenceClassification

    relative = {
        "relative_attention": True,
        "max_relative_positions": 16,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 0,
        "position_biased_input": False,
    }
    return _built(DebertaForSequenceClassification, DebertaConfig(**(_encoder() | relative | changes)))


def opt(**changes: Any) -> nn.Module:
    """OPT, GPT-3's shape with query, key and value apart, with a language-model head."""
    from transformers import OPTConfig, OPTForCausalLM

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _built(OPTForCausalLM, OPTConfig(**(values | changes)))


def vit(**changes: Any) -> nn.Module:
    """ViT on images of 16 x 16 in four patches, with a head of three classes; its input is pixel_values, not `batch`."""
    from transformers import ViTConfig, ViTForImageClassification

    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "num_labels": LABELS,
    }
    return _built(ViTForImageClassification, ViTConfig(**(values | changes)))


def llama(**changes: Any) -> nn.Module:
    """Llama with grouped-query attention and an untied language-model head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _built(LlamaForCausalLM, LlamaConfig(**(values | changes)))


def t5(**changes: Any) -> nn.Module:
    """T5 (encoder and decoder) with a language-model head."""
    from transformers import T5Config, T5ForConditionalGeneration

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    return _built(T5ForConditionalGeneration, T5Config(**(values | changes)))


MODELS = {"gpt2": gpt2, "roberta": roberta, "bert": bert, "deberta": deberta, "llama": llama, "t5": t5}


def batch(model: nn.Module, rows: int = 3, length: int = 7, labels: bool = False) -> dict[str, torch.Tensor]:
    """Valid inputs without padding for ``model``: int64 [rows, length]; T5 gets decoder ids too; ``labels`` on demand."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = {
        "input_ids": torch.randint(3, VOCAB, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
    }
    kind = type(model).__name__
    if kind.startswith("T5"):
        answer = torch.randint(3, VOCAB, (rows, max(length - 2, 1)), generator=generator)
        inputs |= {"labels": answer} if labels else {"decoder_input_ids": answer}
    elif labels and kind.endswith("SequenceClassification"):
        inputs["labels"] = torch.randint(0, LABELS, (rows,), generator=generator)
    elif labels:
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs


def _encoder() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "num_labels": LABELS,
    }


def _built(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: nn.Module = kind(config)
    # fresh biases and norms are zeros and ones: real ones are not, and would hide a bias that is mixed up
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()
