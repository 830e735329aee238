"""What a file says of itself, checked before anything is made of it: PEFT's settings, and the notes of an earlier conversion."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import FileError
from lorakit.store.peft_config import CONFIG

NEEDED = ("r", "lora_alpha", "target_modules")
DTYPES = {
    f"torch.{one}" for one in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
}


def config_faults(config: Mapping[str, Any]) -> list[str]:
    """What is missing from a PEFT configuration, or makes no sense in it, as far as scaling and ranks depend on it."""
    return [f"{key} is missing" for key in NEEDED if not _said(config, key)] + _wrong_values(config)


def _said(config: Mapping[str, Any], key: str) -> bool:
    """Whether a key stands there; target_parameters stand for target_modules."""
    return config.get(key) is not None or (key == "target_modules" and bool(config.get("target_parameters")))


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    faults = []
    for key, kinds, expected in (
        ("r", int, "a whole number over 0"),
        ("lora_alpha", (int, float), "a finite number"),
        ("rank_pattern", dict, "an object"),
        ("alpha_pattern", dict, "an object"),
        ("target_modules", (str, list), "a list of names or a regular expression"),
    ):
        value = config.get(key)
        wrong = value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not _finite(value))
        if wrong or (key == "r" and isinstance(value, int) and value < 1):
            faults.append(f"{CONFIG}: {key} must be {expected}, not {value!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        numbers = patterns.values() if isinstance(patterns, dict) else ()
        if not all(isinstance(one, int | float) and 0 < one < math.inf for one in numbers):
            faults.append(f"{CONFIG}: {key} must map patterns to numbers over 0")
        faults += [fault for one in (patterns if isinstance(patterns, dict) else ()) for fault in _no_pattern(key, one)]
    return faults


def _no_pattern(key: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{CONFIG}: {key}: {pattern!r} is no regular expression ({error})"]
    return []


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def sound_notes(notes: Any, path: Path) -> dict[str, Any]:
    """The notes under "converted" in lorakit.json. Raises FileError where they are not what a conversion writes."""
    kinds: dict[str, Any] = {
        "from": lambda value: isinstance(value, str),
        "component": lambda value: isinstance(value, str),
        "prefix": lambda value: isinstance(value, str),
        "wrapper": lambda value: value is None or isinstance(value, str),
        "metadata": lambda value: isinstance(value, bool),
        "names": lambda value: _mapping(value, lambda one: isinstance(one, str)),
        "conv": lambda value: _mapping(value, lambda one: one in ("dense", "blocks")),
        "merged": lambda value: _mapping(value, lambda one: _list(one) and set(one) <= {0, 1} and any(one)),
        "alphas": lambda value: _mapping(value, _alpha_note),
        "model": lambda value: _list(value) and len(value) == 4 and all(isinstance(one, int) for one in value[1:]),
    }
    if not isinstance(notes, dict):
        raise FileError(f"{path}: converted must be an object, not {notes!r:.80}.")
    wrong = [key for key, value in notes.items() if key not in kinds or not kinds[key](value)]
    if wrong:
        raise FileError(
            f"{path}: converted: {', '.join(map(str, wrong))} is nothing that convert writes: it was changed by hand."
        )
    return notes


def _mapping(value: Any, fits: Any) -> bool:
    return isinstance(value, dict) and all(fits(one) for one in value.values())


def _list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str | int) for one in value)


def _alpha_note(value: Any) -> bool:
    """None, [dtype, dimensions] of kohya, or [key, dtype, dimensions] of diffusers."""
    if value is None:
        return True
    return _list(value) and len(value) in (2, 3) and value[-2] in DTYPES and str(value[-1]) in ("0", "1", "2")
