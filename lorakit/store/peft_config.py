"""PEFT's adapter_config.json: to a lorakit.LoRA and back, refusing what cannot be carried over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import UsageError
from lorakit.methods.lora import LoRA

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
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
# Initialisations that also changed the base: the adapter is right on that changed base alone.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def parse_config(text: str) -> tuple[dict[str, Any], list[str]]:
    """(config, faults) of an adapter_config.json's text; {} where it cannot be read at all."""
    try:
        config = json.loads(text)
    except ValueError as error:
        looks = "a web page" if text.lstrip()[:1] == "<" else f"no JSON ({error})"
        return {}, [f"adapter_config.json: {looks}"]
    if not isinstance(config, dict):
        return {}, ["adapter_config.json: expected a JSON object with r, lora_alpha and target_modules"]
    return config, _faults(config)


def _faults(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        found = "no peft_type" if kind is None else f"peft_type {kind!r}"
        return [f"adapter_config.json: {found}: lorakit reads peft_type 'LORA'"]
    faults = [
        f"adapter_config.json: {key} = {config[key]!r} is not supported: its effect would be lost"
        for key in UNSUPPORTED
        if config.get(key) not in (None, False, [], {}, DEFAULTS.get(key))
    ]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        faults.append(
            f"adapter_config.json: init_lora_weights = {init!r} changed the base that this adapter was trained on; convert "
            "it in PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        to_method(config)
    except UsageError as error:
        faults.append(f"adapter_config.json: {error}")
    return faults


def to_method(config: Mapping[str, Any]) -> LoRA:
    """The lorakit.LoRA that a PEFT configuration means. Raises UsageError on a value that makes no sense."""
    targets = config.get("target_modules")
    if not targets:
        raise UsageError("target_modules is missing: it says which layers the adapter belongs to.")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise UsageError(f"{key} must be an object, not {config[key]!r}.")
    try:
        return LoRA(
            r=config.get("r", DEFAULTS["r"]),
            alpha=config.get("lora_alpha", DEFAULTS["lora_alpha"]),
            target_modules=targets if isinstance(targets, str) else list(targets),
            dropout=config.get("lora_dropout") or 0.0,
            bias=config.get("bias", "none"),
            use_rslora=bool(config.get("use_rslora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            exclude_modules=config.get("exclude_modules") or None,
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern") or None,
            modules_to_save=config.get("modules_to_save") or None,
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        )
    except TypeError as error:
        raise UsageError(f"a value has the wrong type ({error}).") from error


def from_method(method: LoRA, targets: str | list[str], raw: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT configuration. targets: as to be written ("all-linear" resolved). raw: keys to keep from the adapter's own file."""
    return {
        **DEFAULTS,
        **raw,
        "peft_type": "LORA",
        "r": method.r,
        "lora_alpha": method.alpha,
        "target_modules": targets,
        "lora_dropout": method.dropout,
        "bias": method.bias,
        "use_rslora": method.use_rslora,
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": dict(method.alpha_pattern),
        "exclude_modules": _plain(method.exclude_modules),
        "layers_to_transform": _plain(method.layers_to_transform),
        "layers_pattern": _plain(method.layers_pattern),
        "modules_to_save": _plain(method.modules_to_save),
        "init_lora_weights": raw.get("init_lora_weights", "gaussian" if method.init == "gaussian" else True),
        "inference_mode": True,
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int) else list(value)


def read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(config, faults) of the folder's adapter_config.json."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}, [f"adapter_config.json: not there ({folder} is no adapter folder)"]
    try:
        return parse_config(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"adapter_config.json: cannot be read ({error})"]
