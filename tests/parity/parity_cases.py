"""The table of configurations that PEFT and lorakit must agree on, and the ways between the two."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from safetensors import safe_open
from torch import nn

import lorakit as lk

TO_PEFT = {"alpha": "lora_alpha", "dropout": "lora_dropout", "init": "init_lora_weights"}
VERSION_KEYS = {"peft_version"}


@dataclass(frozen=True)
class Case:
    """One configuration. fields: of lorakit.LoRA; peft: what PEFT's LoraConfig wants besides, or instead."""

    model: str
    fields: dict[str, Any]
    peft: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        return getattr(tiny, self.model)()

    def method(self) -> Any:
        return lk.LoRA(**self.fields)

    def config(self) -> Any:
        from peft import LoraConfig

        values = {TO_PEFT.get(key, key): value for key, value in self.fields.items()}
        return LoraConfig(**{**values, **self.peft})


CONV = {"fan_in_fan_out": True}  # else PEFT warns that it sets it itself
SEQ_CLS = {"task_type": "SEQ_CLS", "modules_to_save": None}  # PEFT then notes "classifier" and "score" by itself
ROBERTA, LLAMA = ["query", "value"], ["q_proj", "v_proj"]

CASES = {
    "linear": Case("llama", {"r": 4, "alpha": 8, "target_modules": LLAMA}),
    "linear-biased": Case("roberta", {"r": 4, "alpha": 8, "target_modules": ROBERTA}),
    "deberta": Case("deberta", {"r": 4, "alpha": 8, "target_modules": ["query_proj", "value_proj"]}),
    "t5": Case("t5", {"r": 4, "alpha": 8, "target_modules": ["q", "v", "wi"]}),
    "conv1d": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": ["c_attn"]}, CONV),
    "conv1d-all": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}, CONV),
    "embedding": Case("llama", {"r": 4, "alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-tied": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": ["wte", "c_attn"]}, CONV),
    "embedding-positions": Case("roberta", {"r": 4, "alpha": 8, "target_modules": ["position_embeddings", "query"]}),
    "head": Case("roberta", {"r": 4, "alpha": 8, "target_modules": ROBERTA, "modules_to_save": ["classifier"]}),
    "head-seq-cls": Case(
        "roberta", {"r": 4, "alpha": 8, "target_modules": ROBERTA, "modules_to_save": ["classifier"]}, SEQ_CLS
    ),
    "head-deberta-seq-cls": Case(
        "deberta", {"r": 2, "alpha": 2, "target_modules": ["query_proj"], "modules_to_save": ["classifier"]}, SEQ_CLS
    ),
    "head-two": Case(
        "deberta", {"r": 2, "alpha": 2, "target_modules": ["query_proj"], "modules_to_save": ["pooler", "classifier"]}
    ),
    "head-lm": Case("llama", {"r": 2, "alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rank-pattern": Case(
        "llama",
        {
            "r": 4,
            "alpha": 8,
            "target_modules": LLAMA,
            "rank_pattern": {"v_proj": 2, r"model\.layers\.0\.self_attn\.q_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 5},
        },
    ),
    "rank-pattern-rslora": Case(
        "gpt2",
        {"r": 4, "alpha": 8, "target_modules": ["c_attn"], "use_rslora": True, "rank_pattern": {"h.0.attn.c_attn": 9}},
        CONV,
    ),
    "rslora": Case("llama", {"r": 4, "alpha": 8, "target_modules": LLAMA, "use_rslora": True}),
    "bias-all": Case("roberta", {"r": 4, "alpha": 8, "target_modules": ROBERTA, "bias": "all"}),
    "bias-all-gpt2": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": ["c_attn"], "bias": "all"}, CONV),
    "bias-all-t5": Case("t5", {"r": 4, "alpha": 8, "target_modules": ["q", "v"], "bias": "all"}),
    "bias-all-head": Case(
        "roberta",
        {"r": 4, "alpha": 8, "target_modules": ROBERTA, "bias": "all", "modules_to_save": ["classifier"]},
        SEQ_CLS,
    ),
    "bias-lora-only": Case("roberta", {"r": 4, "alpha": 8, "target_modules": ROBERTA, "bias": "lora_only"}),
    "bias-lora-only-gpt2": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": ["c_attn"], "bias": "lora_only"}, CONV),
    "regex": Case("llama", {"r": 4, "alpha": 8, "target_modules": r".*layers\.1\..*(q_proj|up_proj)"}),
    "all-linear": Case("llama", {"r": 4, "alpha": 8, "target_modules": "all-linear"}),
    "all-linear-gpt2": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": "all-linear"}, CONV),
    "all-linear-t5": Case("t5", {"r": 4, "alpha": 8, "target_modules": "all-linear"}),
    "all-linear-seq-cls": Case(
        "roberta", {"r": 4, "alpha": 8, "target_modules": "all-linear", "modules_to_save": ["classifier"]}, SEQ_CLS
    ),
    "exclude": Case(
        "llama", {"r": 4, "alpha": 8, "target_modules": LLAMA, "exclude_modules": ["layers.0.self_attn.q_proj"]}
    ),
    "exclude-regex": Case(
        "llama", {"r": 4, "alpha": 8, "target_modules": LLAMA, "exclude_modules": r".*\.0\..*v_proj"}
    ),
    "layers": Case("llama", {"r": 4, "alpha": 8, "target_modules": LLAMA, "layers_to_transform": [1]}),
    "layers-one": Case("gpt2", {"r": 4, "alpha": 8, "target_modules": ["c_attn"], "layers_to_transform": 0}, CONV),
    "layers-pattern": Case(
        "t5", {"r": 4, "alpha": 8, "target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "block"}
    ),
    "gaussian": Case("llama", {"r": 4, "alpha": 8, "target_modules": LLAMA, "init": "gaussian"}),
    "dropout": Case("llama", {"r": 4, "alpha": 8, "target_modules": LLAMA, "dropout": 0.1}),
}


def lorakit_model(case: Case, dtype: torch.dtype | None = None) -> nn.Module:
    """The case's model with a lorakit adapter of random values everywhere."""
    model = case.base()
    lk.attach(model, case.method(), dtype=dtype)
    randomise(lk.parameters(model, "default"))
    return model


def peft_model(case: Case) -> Any:
    """The case's model wrapped by PEFT, with random values in everything that it trains."""
    from peft import get_peft_model

    model = get_peft_model(case.base(), case.config())
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    return model.eval()


def randomise(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)


def peft_load(case: Case, folder: Path, base: nn.Module | None = None, **options: Any) -> Any:
    """PeftModel.from_pretrained, and no key missing or left over."""
    from peft import PeftModel

    results, load_adapter = [], PeftModel.load_adapter

    def noted(*args: Any, **kwargs: Any) -> Any:
        results.append(load_adapter(*args, **kwargs))
        return results[-1]

    with mock.patch.object(PeftModel, "load_adapter", noted):
        model = PeftModel.from_pretrained(case.base() if base is None else base, str(folder), **options)
    (result,) = results
    if result.missing_keys or result.unexpected_keys:
        raise RuntimeError(f"PEFT misses {result.missing_keys}, does not know {result.unexpected_keys}")
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model(**tiny.batch(inner)).logits.float()


def stored(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, config) of an adapter folder, read by safetensors itself."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config without version keys; lists that PEFT writes from sets in order."""
    config = copy.deepcopy({key: value for key, value in config.items() if key not in VERSION_KEYS})
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    return config
