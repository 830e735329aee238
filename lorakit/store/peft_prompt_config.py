"""PEFT's adapter_config.json of prompt tuning, P-tuning and prefix tuning: to a method and back."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.attach.host import Record
from lorakit.attach.method import Draft, Method
from lorakit.errors import Passing, UsageError
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.prefix import Prefix
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt_tuning import PromptTuning
from lorakit.store.peft_config import CONFIG

TYPES: dict[str, type[Method]] = {"PROMPT_TUNING": PromptTuning, "P_TUNING": PTuning, "PREFIX_TUNING": PrefixTuning}
SHARED: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "modules_to_save": None,
    "num_attention_heads": None, "num_layers": None, "num_transformer_submodules": None, "num_virtual_tokens": None,
    "revision": None, "task_type": None, "token_dim": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {
        "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
    "P_TUNING": {
        "encoder_dropout": 0.0, "encoder_hidden_size": None, "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    },
    "PREFIX_TUNING": {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False},
}  # fmt: skip
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration of this type says where it says nothing."""
    return {**SHARED, **OWN.get(str(config.get("peft_type")), {})}


def prompt_config(model: Any, record: Record, embeddings: Tensor) -> dict[str, Any]:
    """adapter_config.json: as it was read, or new."""
    raw = record.meta.get("config")
    if raw:
        return {**raw, "inference_mode": True}
    method = record.method
    kind = next(name for name, cls in TYPES.items() if cls is type(method))
    length, width = embeddings.shape
    text = model.config.get_text_config()
    heads, dim, layers = text.num_attention_heads, width, text.num_hidden_layers
    own: dict[str, Any] = {}
    if isinstance(method, PTuning):
        own = {
            "encoder_reparameterization_type": method.encoder.upper(),
            "encoder_hidden_size": method.hidden or width,
            "encoder_num_layers": method.layers,
        }
    elif isinstance(method, PrefixTuning):
        shapes = {(one.heads, one.width) for one in _prefixes(record.draft)}
        if len(shapes) > 1:
            raise UsageError(
                "PEFT's folder has keys of one shape for all layers, and this model's layers have several."
            )
        heads, own["prefix_projection"] = next(iter(shapes))[0], method.reparametrise
        layers = len(_prefixes(record.draft))
        dim = width // (2 * layers)
        own["encoder_hidden_size"] = method.hidden or text.hidden_size
    base = getattr(model.config, "_name_or_path", None) or None
    return {
        **SHARED,
        **OWN[kind],
        **own,
        "base_model_name_or_path": base,
        "modules_to_save": list(method.modules_to_save) if method.modules_to_save else None,  # type: ignore[attr-defined]
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": kind,
        "task_type": next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None),
        "token_dim": dim,
    }


def _prefixes(draft: Draft) -> list[Prefix]:
    return [
        insert.operation
        for group in draft.inserts.values()
        for insert in group.values()
        if isinstance(insert.operation, Prefix)
    ]


def read_prompt_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(adapter_config.json, faults); {} where it cannot be read."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        return {}, ["not there"]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [Passing(f"cannot be read ({error})")]
    except (ValueError, RecursionError) as error:
        return {}, [f"no JSON ({error})"]
    return (config, []) if isinstance(config, dict) else ({}, ["expected a JSON object"])


def prompt_method(config: Mapping[str, Any]) -> tuple[Method | None, list[str]]:
    """What a configuration means, and what is wrong with it."""
    kind, faults = config["peft_type"], list[str]()
    if config.get("num_transformer_submodules") not in (1, None):
        faults.append(
            f"num_transformer_submodules = {config['num_transformer_submodules']!r}: prompts of encoder-decoders are not "
            "supported"
        )
    known = {*SHARED, *OWN[kind], "peft_type", "peft_version"}
    faults += [
        f"{key} = {config[key]!r} is not supported: its effect would be lost"
        for key in config
        if key not in known and config[key] not in (None, False, [], {})
    ]
    build = {"PROMPT_TUNING": _prompt_tuning, "P_TUNING": _p_tuning, "PREFIX_TUNING": _prefix_tuning}[kind]
    try:
        method = build(config)
    except (UsageError, TypeError, ValueError) as error:
        return None, [*faults, str(error)]
    return method, faults


def _prompt_tuning(config: Mapping[str, Any]) -> Method:
    return PromptTuning(
        config.get("num_virtual_tokens"),  # type: ignore[arg-type]  # checked there
        "random" if config.get("prompt_tuning_init", "RANDOM") == "RANDOM" else "vocabulary",
        modules_to_save=config.get("modules_to_save"),
    )


def _p_tuning(config: Mapping[str, Any]) -> Method:
    return PTuning(
        config.get("num_virtual_tokens"),  # type: ignore[arg-type]
        str(config.get("encoder_reparameterization_type", "MLP")).lower(),
        config.get("encoder_hidden_size"),
        config.get("encoder_num_layers", 2),
        modules_to_save=config.get("modules_to_save"),
    )


def _prefix_tuning(config: Mapping[str, Any]) -> Method:
    projected = bool(config.get("prefix_projection"))
    return PrefixTuning(
        config.get("num_virtual_tokens"),  # type: ignore[arg-type]
        reparametrise=projected,
        hidden=config.get("encoder_hidden_size") if projected else None,
        modules_to_save=config.get("modules_to_save"),
    )
