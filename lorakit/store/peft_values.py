"""The values of a PEFT configuration as a lorakit.LoRA, each checked on its own, so that every wrong one is told at once."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorakit.errors import UsageError
from lorakit.methods.lora import LoRA


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _names(value: Any) -> bool:
    return _text(value) or _texts(value)


def _numbers(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _rows(value: Any) -> bool:
    groups = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(group, list) and all(map(_whole, group)) for group in groups)


class Rule(NamedTuple):
    """How a key of PEFT's becomes a field of LoRA. LoRA checks the value itself; this only what its type must be."""

    field: str
    fits: Callable[[Any], bool]
    expected: str
    patterns: bool = False  # whether the value (a text, or a mapping's keys) holds regular expressions


RULES = {
    "r": Rule("r", _whole, "a whole number"),
    "lora_alpha": Rule("alpha", _number, "a number"),
    "target_modules": Rule("target_modules", _names, "a list of names or a regular expression", patterns=True),
    "lora_dropout": Rule("dropout", _number, "a number"),
    "bias": Rule("bias", _text, "a text"),
    "use_rslora": Rule("use_rslora", _flag, "true or false"),
    "rank_pattern": Rule("rank_pattern", _mapping, "an object", patterns=True),
    "alpha_pattern": Rule("alpha_pattern", _mapping, "an object", patterns=True),
    "exclude_modules": Rule("exclude_modules", _names, "a list of names or a regular expression", patterns=True),
    "layers_to_transform": Rule("layers_to_transform", _numbers, "a whole number or a list of them"),
    "layers_pattern": Rule("layers_pattern", _names, "a name or a list of names", patterns=True),
    "modules_to_save": Rule("modules_to_save", _texts, "a list of names"),
    "use_dora": Rule("use_dora", _flag, "true or false"),
    "lora_bias": Rule("lora_bias", _flag, "true or false"),
    "target_parameters": Rule("target_parameters", _texts, "a list of names"),
    "trainable_token_indices": Rule("trainable_token_indices", _rows, "a list of whole numbers, or an object of lists"),
    "ensure_weight_tying": Rule("ensure_weight_tying", _flag, "true or false"),
}
EMPTY_IS_NULL = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
)


def to_method(config: Mapping[str, Any]) -> tuple[LoRA | None, list[str]]:
    """(method, faults): the lorakit.LoRA that a PEFT configuration means, or every value in it that makes no sense.

    config: with PEFT's default wherever the file leaves a key out.
    """
    fields: dict[str, Any] = {}
    faults: list[str] = []
    for key, rule in RULES.items():
        value = config[key]
        if key in EMPTY_IS_NULL and value in (None, "", [], {}):
            continue
        wrong = _wrong(key, rule, value, bool(config["target_parameters"] or config["trainable_token_indices"]))
        faults += wrong
        fields[rule.field] = value
    if config.get("init_lora_weights") in ("gaussian", "pissa", "olora"):
        fields["init"] = config["init_lora_weights"]
    if not fields.get("target_modules", True) and (
        fields.get("target_parameters") or fields.get("trainable_token_indices")
    ):
        fields["target_modules"] = []
    return (None, faults) if faults else _built(fields)


def _wrong(key: str, rule: Rule, value: Any, elsewhere: bool) -> list[str]:
    if key == "target_modules" and not value and elsewhere:
        return []
    if value is None and key == "target_modules":
        return ["target_modules is missing: it says which layers the adapter belongs to"]
    if not rule.fits(value):
        return [f"{key} must be {rule.expected}, not {value!r}"]
    patterns = list(value) if isinstance(value, dict) else [value] if isinstance(value, str) else []
    faults = [fault for pattern in patterns if rule.patterns for fault in _no_pattern(key, pattern)]
    if faults or key == "layers_pattern":  # which means nothing on its own
        return faults
    return _built({rule.field: value})[1]


def _no_pattern(key: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{key}: {pattern!r} is no regular expression ({error})"]
    return []


def _built(fields: Mapping[str, Any]) -> tuple[LoRA | None, list[str]]:
    try:
        return LoRA(**fields), []
    except (UsageError, OverflowError) as error:  # a whole number too large for a float overflows
        return None, [str(error)]
