"""Reading an adapter folder: everything is checked, and every fault listed, before anything reaches a model."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.method import Draft
from lorakit.errors import FileError, TargetError, UsageError
from lorakit.methods.lora import LoRA
from lorakit.store.files import read_header
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.peft_config import read_config, to_method
from lorakit.store.peft_folder import parse, to_draft

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EXTRA = "lorakit.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass
class AdapterFile:
    """An adapter folder as read. extra: lorakit.json's content; {} where another program wrote the folder."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read_folder(folder: Path) -> AdapterFile:
    """Read and check a folder on its own (no model). Faults are collected, never raised."""
    found = AdapterFile(folder)
    if not folder.is_dir():
        found.faults.append(f"{folder} is {'a file' if folder.exists() else 'not there'}: expected an adapter folder")
        return found
    found.config, found.faults = read_config(folder)
    found.extra, faults = _read_extra(folder)
    found.faults += faults
    found.tensors, faults = _read_tensors(folder)
    found.faults += faults
    if found.tensors:
        found.faults += parse(found.tensors).faults + _rank_faults(found) + _value_faults(found)
    return found


def _read_extra(folder: Path) -> tuple[dict[str, Any], list[str]]:
    path = folder / EXTRA
    if not path.is_file():
        return {}, []
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"{EXTRA}: no JSON ({error})"]
    return (extra, []) if isinstance(extra, dict) else ({}, [f"{EXTRA}: expected a JSON object"])


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    path = folder / TENSORS
    if not path.is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        if pickles:
            return {}, [
                f"{pickles[0]}: a pickle, which can run code when it is opened: refused. Save it as {TENSORS} where it came from"
            ]
        return {}, [f"{TENSORS}: not there"]
    try:
        entries, _, faults = read_header(path)
    except OSError as error:
        return {}, [f"{TENSORS}: cannot be read ({error})"]
    if faults:
        return {}, faults
    if not entries:
        return {}, [f"{TENSORS}: holds no tensor"]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path)), []
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return {}, [f"{TENSORS}: damaged ({error})"]


def _rank_faults(found: AdapterFile) -> list[str]:
    """Ranks that differ from the configuration's: known without a model."""
    try:
        method = to_method(found.config)
    except UsageError:
        return []
    faults = []
    for path, halves in parse(found.tensors).pairs.items():
        if 0 in halves and halves[0].dim() == 2 and halves[0].shape[0] != method.rank(path):
            faults.append(f"{path}: rank {halves[0].shape[0]} in the file, {method.rank(path)} by {CONFIG}")
    return faults


def _value_faults(found: AdapterFile) -> list[str]:
    faults = [
        f"{key}: holds values that are not finite (NaN or infinity)"
        for key, tensor in found.tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    expected = found.extra.get("adapter")
    if expected and found.config and content_hash(found.config, found.tensors) != expected:
        faults.append(
            f"{EXTRA} names the hash {expected}, which this content does not have: files of two adapters, or changed by hand"
        )
    return faults


def fit(found: AdapterFile, model: nn.Module, *, check_base: bool) -> tuple[LoRA, Draft]:
    """The method and draft of a read folder on `model`. Raises FileError with every fault of the file and of the fit."""
    if found.faults:
        raise FileError(f"the adapter in {found.folder} cannot be loaded:", found.faults)
    method = _for_model(to_method(found.config), found, model)
    draft, faults = to_draft(parse(found.tensors), method, model)
    faults += _coverage_faults(method, draft, found, model)
    expected = found.extra.get("base")
    if check_base and expected and not faults:
        came = fingerprint(model, draft)
        if came is not None and came != expected:
            name = found.config.get("base_model_name_or_path")
            faults.append(
                f"it was trained on another base ({name or 'unnamed'}, {expected}) than this model ({came}). Load that base, or "
                "pass check_base=False if you know better"
            )
    if faults:
        raise FileError(f"the adapter in {found.folder} does not fit this {type(model).__name__}:", faults)
    return method, draft


def _for_model(method: LoRA, found: AdapterFile, model: nn.Module) -> LoRA:
    """PEFT notes heads by every name that it knows ("classifier", "score"): keep those that the model or the file has."""
    kept = [
        name
        for name in method.modules_to_save or ()
        if any(f".{name}." in f".{key}." for key in parse(found.tensors).plain)
        or any(path == name or path.endswith("." + name) for path, _ in model.named_modules())
    ]
    return replace(method, modules_to_save=kept or None)


def _coverage_faults(method: LoRA, draft: Draft, found: AdapterFile, model: nn.Module) -> list[str]:
    """Layers that the configuration names and the file lacks, and the other way round."""
    try:
        expected = method.targets(model)
    except TargetError as error:
        return [str(error)]
    pairs = parse(found.tensors).pairs
    faults = [
        f"{path}: named by target_modules, but the file has no tensors for it" for path in expected if path not in pairs
    ]
    named = set(expected)
    return faults + [
        f"{path}: in the file, but not named by target_modules" for path in draft.pairs if path not in named
    ]


def locate(source: str | Path) -> Path:
    """The local folder of an adapter: itself, or a download of a hub id ("owner/name"). Raises FileError."""
    path = Path(source).expanduser()
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, TENSORS, EXTRA]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(
            f"{source!r} is no folder here, and the hub has no such adapter to offer ({reason}). Expected a folder with {CONFIG} "
            "and adapter_model.safetensors, or a hub id."
        ) from error
