"""PEFT's adapter_config.json: to a lorakit.LoRA and back, refusing what cannot be carried over."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.attach.method import Pair
from lorakit.errors import Passing
from lorakit.methods.lora import LoRA
from lorakit.store.peft_values import to_method

CONFIG = "adapter_config.json"
# Every key that PEFT writes for LoRA and its default (read from peft 0.21.2).
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": None, "target_parameters": None, "task_type": None,
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
# Keys that may stand in a file with their default only: each changes what the adapter computes.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip
# Initialisations that also changed the base, in a way that the base alone does not tell: they drew at random, or saw data.
CHANGES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga", "mica")


# Keys whose lists are sets: PEFT writes them in any order.
SETS = ("target_modules", "exclude_modules", "modules_to_save")


def read_config(folder: Path) -> tuple[dict[str, Any], LoRA | None, list[str]]:
    """(config, method, faults) of the folder's adapter_config.json; no method where it is faulty."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        return {}, None, [f"{CONFIG}: not there ({folder} is no adapter folder)"]
    try:
        return parse_config(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, None, [Passing(f"{CONFIG}: cannot be read ({error})")]
    except UnicodeDecodeError as error:
        return {}, None, [f"{CONFIG}: cannot be read ({error})"]


def parse_config(text: str) -> tuple[dict[str, Any], LoRA | None, list[str]]:
    """(config, method, faults) of an adapter_config.json's text; {} where it cannot be read at all."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        looks = "a web page" if text.lstrip()[:1] == "<" else f"no JSON ({error})"
        return {}, None, [f"{CONFIG}: {looks}"]
    if not isinstance(config, dict):
        return {}, None, [f"{CONFIG}: expected a JSON object with r, lora_alpha and target_modules"]
    kind = config.get("peft_type")
    if kind != "LORA":
        found = "no peft_type" if kind is None else f"peft_type {kind!r}"
        return config, None, [f"{CONFIG}: {found}: lorakit reads peft_type 'LORA'"]
    faults = _unsupported(config)
    method, wrong = to_method({**DEFAULTS, **config})
    return config, method, [f"{CONFIG}: {fault}" for fault in faults + wrong]


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{key} = {config[key]!r} is not supported: its effect would be lost"
        for key in UNSUPPORTED
        if config.get(key) not in (None, False, [], {}, DEFAULTS.get(key))
    ]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        faults.append(
            f"init_lora_weights = {init!r} changed the base that this adapter was trained on; convert it in PEFT first "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return faults


def from_method(
    method: LoRA, targets: str | list[str], raw: Mapping[str, Any], pairs: Mapping[str, Pair]
) -> dict[str, Any]:
    """A PEFT configuration.

    targets: as to be written ("all-linear" resolved). raw: the adapter's own file where it was loaded from one, {} where
    it was not; it says the same as `method`, in its own words, and those are kept. pairs: of the draft that is written.
    """
    said = {
        "r": method.r,
        "lora_alpha": method.alpha,
        "target_modules": targets,
        "lora_dropout": method.dropout,
        "bias": method.bias,
        "use_rslora": method.use_rslora,
        "use_dora": method.use_dora,
        "lora_bias": method.lora_bias,
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": dict(method.alpha_pattern),
        "exclude_modules": _plain(method.exclude_modules),
        "layers_to_transform": _plain(method.layers_to_transform),
        "layers_pattern": _plain(method.layers_pattern),
        "modules_to_save": _plain(method.modules_to_save),
        "target_parameters": _plain(method.target_parameters),
        "trainable_token_indices": _plain(method.trainable_token_indices),
        "ensure_weight_tying": method.ensure_weight_tying,
        "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
    }
    config = {**DEFAULTS, **(raw or said), "peft_type": "LORA", "inference_mode": True}
    return _widened(config, method, pairs)


def _widened(config: dict[str, Any], method: LoRA, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """The configuration of the ordinary pairs that are written for pairs with fixed ones, or on parts of a projection.

    Their ranks are multiples of what the method says, and alpha follows, so that the scaling stays.
    """
    ranks = {path: _rank(method, path, pair) for path, pair in pairs.items()}
    if all(rank == method.rank(path) for path, rank in ranks.items()):
        return config
    wide = {path: (rank, _alpha(method, path, rank)) for path, rank in ranks.items()}
    (rank, alpha), *others = sorted(set(wide.values()))
    config |= {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    if others:
        config["rank_pattern"] = {f"^{re.escape(path)}": r for path, (r, _) in wide.items()}
        config["alpha_pattern"] = {f"^{re.escape(path)}": alpha for path, (_, alpha) in wide.items()}
    return config


def _rank(method: LoRA, path: str, pair: Pair) -> int:
    """The rank of the ordinary pair that is written (a start from a small weight may have fewer than the method says)."""
    ordinary = pair.parts is None and pair.fixed_a is None
    return method.rank(path) if ordinary else pair.factors()[0].shape[0]


def _alpha(method: LoRA, path: str, rank: int) -> float:
    """The alpha that gives `rank` the scaling that the method has at `path`."""
    scaling = method.scaling(path)
    return scaling * math.sqrt(rank) if method.use_rslora else scaling * rank


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: list(one) for key, one in value.items()}
    return value if value is None or isinstance(value, str | int) else list(value)
