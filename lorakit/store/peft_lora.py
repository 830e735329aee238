"""The layout of LoRA: PEFT's own folder, with lorakit.json beside it for what PEFT has no key for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.host import Record
from lorakit.attach.kinds import Conv1DKind, EmbeddingKind, low_rank_kind
from lorakit.attach.method import Draft, Method
from lorakit.attach.targets import ALL_LINEAR, shortest_names
from lorakit.methods.lora import LoRA
from lorakit.methods.pissa import from_base
from lorakit.store.card import model_card
from lorakit.store.files import json_bytes
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.layout import EXTRA, FORMAT, TENSORS, Layout, Stored
from lorakit.store.peft_config import CONFIG, from_method
from lorakit.store.peft_folder import to_tensors
from lorakit.store.read import AdapterFile, on_model, read_folder


class PeftLora(Layout):
    """See the module. It stands last in the table: a folder that nobody else knows is read, and refused, as PEFT's."""

    def takes(self, method: Method) -> bool:
        return isinstance(method, LoRA)

    def recognises(self, folder: Path) -> bool:
        return True

    def files(self, model: nn.Module, record: Record, notes: Mapping[str, Any]) -> dict[str, bytes]:
        from safetensors.torch import save as serialise

        method = cast(LoRA, record.method)
        tensors = to_tensors(record.draft, model, method)
        config = _config(model, record, method)
        replaced = {f"{path}.{key}" for path, group in record.draft.replaced.items() for key in group}
        extra = {
            **record.meta.get("extra", {}),
            **notes,
            **_trained_as(method),
            "format": FORMAT,
            "method": method.name,
            "adapter": content_hash(config, tensors),
            "base": fingerprint(model, replaced),
        }
        return {
            EXTRA: json_bytes(extra, "notes"),
            TENSORS: serialise(tensors, metadata={"format": "pt"}),
            CONFIG: json_bytes(config, CONFIG),
            "README.md": model_card(config, tensors, extra).encode(errors="replace"),
        }

    def read(self, folder: Path) -> AdapterFile:
        return read_folder(folder, wait=False)

    def draft(self, found: Stored, method: Method, model: nn.Module) -> tuple[Method, Draft, list[str]]:
        return on_model(cast(AdapterFile, found), cast(LoRA, method), model)


def _trained_as(method: LoRA) -> dict[str, Any]:
    """What made the file's pairs wider than what was trained: parts of a fused matrix, a start taken from the base."""
    said: dict[str, Any] = {}
    if method.enable_lora:
        said["enable_lora"] = {key: list(value) for key, value in method.enable_lora.items()}
    if from_base(method.init) is not None:
        said["init"] = method.init
    return {"trained_as": said} if said else {}


def _config(model: nn.Module, record: Record, method: LoRA) -> dict[str, Any]:
    raw = dict(record.meta.get("config", {}))
    paths = list(record.draft.pairs)
    targets = method.target_modules
    written = shortest_names(model, paths) if targets == ALL_LINEAR else targets
    config = from_method(method, written if isinstance(written, str) else list(written), raw, record.draft.pairs)
    if config["base_model_name_or_path"] is None:
        config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if not raw:
        kinds = [low_rank_kind(plain(type(model.get_submodule(path)))) for path in paths]
        dense = [kind for kind in kinds if not isinstance(kind, EmbeddingKind)]  # an embedding has no such setting
        config["fan_in_fan_out"] = bool(dense) and all(isinstance(kind, Conv1DKind) for kind in dense)
    return config
