"""Tensors that are no pairs: biases and whole modules trained beside them, told apart by their names."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from lorakit.store.peft_folder import PREFIX


class Trained(NamedTuple):
    """keys: the model's parameter name -> PEFT's key. settings: bias and modules_to_save for a configuration."""

    keys: dict[str, str]
    settings: dict[str, Any]
    faults: list[str]


def trained(names: Iterable[str], adapted: Collection[str]) -> Trained:
    """What parameters trained in full, by their names in the model, mean to PEFT. adapted: paths of pairs."""
    names = list(names)
    known = set(names)
    keys: dict[str, str] = {}
    bias = "none"
    whole: dict[str, None] = {}
    faults: list[str] = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and f"{path}.weight" not in known:
            inside = path in adapted
            keys[name] = f"{PREFIX}{path}.base_layer.bias" if inside else f"{PREFIX}{name}"
            bias = "all" if not inside or bias == "all" else "lora_only"
        elif path in adapted:
            faults.append(
                f"{name}: the base's own weight of an adapted layer: this is a whole model, not an adapter's file"
            )
        elif not path:
            faults.append(f"{name}: a parameter of no module")
        else:
            keys[name] = f"{PREFIX}{name}"
            whole[path] = None
    return Trained(keys, {"bias": bias, "modules_to_save": list(whole) or None}, faults)


def parameter_name(key: str) -> str:
    """The model's own name of the parameter under a PEFT key."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")
