"""The base model's module names and settings, for files that do not say enough themselves. No weights are loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import ModelError


@dataclass(frozen=True)
class Base:
    """modules: component ("" for a model that is no pipeline) -> path -> module. config: the model's own config.json."""

    modules: dict[str, dict[str, nn.Module]]
    config: dict[str, Any]

    def component(self, name: str) -> dict[str, nn.Module]:
        """The modules of a component; of the only model where the base is no pipeline."""
        return self.modules.get(name, self.modules.get("", {}))


def open_base(base: "str | Path | nn.Module | Mapping[str, nn.Module]") -> Base:
    """From a model, a pipeline's components by name, or a folder with config.json or model_index.json.

    Raises ModelError where a folder is no model's.
    """
    if isinstance(base, nn.Module):
        return Base({"": dict(base.named_modules())}, _settings(base))
    if isinstance(base, Mapping):
        parts = {name: dict(one.named_modules()) for name, one in base.items() if isinstance(one, nn.Module)}
        return Base(parts, {})
    folder = Path(base).expanduser()
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
        parts = {
            name: dict(_skeleton(folder / name).named_modules())
            for name, kind in index.items()
            if isinstance(kind, list) and kind[:1] in (["diffusers"], ["transformers"]) and _is_model(folder / name)
        }
        return Base(parts, {})
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is no model's folder: expected one with config.json, or a pipeline's with model_index.json."
        )
    return Base({"": dict(_skeleton(folder).named_modules())}, _json(folder / "config.json"))


def _settings(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        return {}
    settings = config.to_dict() if callable(getattr(config, "to_dict", None)) else dict(config)
    return {**settings, "architectures": [type(model).__name__]}


def _is_model(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = _json(path)
    return bool(config.get("architectures")) or "_class_name" in config


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object.")
    return value


def _skeleton(folder: Path) -> nn.Module:
    """The model without its weights."""
    config = _json(folder / "config.json")
    try:
        with torch.device("meta"):
            if "_class_name" in config:
                import diffusers

                kind = getattr(diffusers, str(config["_class_name"]))
                built: nn.Module = kind.from_config(config)
            else:
                import transformers

                kind = getattr(transformers, str((config.get("architectures") or ["no architecture"])[0]))
                built = kind(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (AttributeError, ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: no model can be built from its config.json ({error}).") from error
    return built
