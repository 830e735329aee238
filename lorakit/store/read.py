"""Reading an adapter folder: everything is checked, and every fault listed, before anything reaches a model."""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from lorakit.attach.anatomy import shared_with, walk
from lorakit.attach.method import Draft
from lorakit.attach.targets import find_modules, matches
from lorakit.errors import FileError, TargetError
from lorakit.methods.lora import LoRA
from lorakit.store.layout import (
    EXTRA,
    FORMAT,
    TENSORS,
    Stored,
    hash_faults_beside,
    read_extra,
    read_tensors_of,
    value_faults,
)
from lorakit.store.peft_config import CONFIG, read_config
from lorakit.store.peft_folder import BIAS, MAGNITUDE, Parsed, parse, to_draft

__all__ = ["EXTRA", "FORMAT", "TENSORS", "AdapterFile", "checked", "locate", "read_folder"]
FILES = tuple(
    f"{below}{file}" for below in ("", "*/") for file in (CONFIG, TENSORS, EXTRA)
)  # a combination has subfolders


@dataclass
class AdapterFile(Stored):
    """A PEFT folder of LoRA as read. parsed: its tensors by what they are."""

    method: LoRA | None = None
    parsed: Parsed = field(default_factory=Parsed)

    @property
    def kind(self) -> str:
        return f"peft ({self.config.get('peft_type', 'unknown')})"

    def replaced(self) -> Collection[str]:
        return self.parsed.plain


def read_folder(folder: Path, *, wait: bool = True) -> AdapterFile:
    """Read and check a PEFT folder of LoRA on its own (no model). Faults are collected, never raised.

    wait: for the hash of the content, the longest part; without, `settle` does.

    Folders of any method: lorakit.store.layouts.read.
    """
    found = AdapterFile(folder)
    if not os.path.isdir(folder):
        found.faults.append(
            f"{folder} is {'a file' if os.path.exists(folder) else 'not there'}: expected an adapter folder"
        )
        return found
    found.extra, faults = read_extra(folder)
    if not os.path.isfile(folder / CONFIG) and found.extra.get("method", LoRA.name) != LoRA.name:
        found.faults.append(f"{EXTRA}: the method is {found.extra['method']!r}, where a LoRA adapter is expected")
        return found
    found.config, found.method, wrong = read_config(folder)
    found.faults += wrong + faults
    found.tensors, faults = read_tensors_of(folder)
    found.faults += faults
    return checked(found, wait=wait)


def checked(found: AdapterFile, *, wait: bool = True) -> AdapterFile:
    """`found` with its tensors sorted and searched for faults. wait: see read_folder."""
    if found.tensors:
        found.pending.append(hash_faults_beside(found))
        found.parsed = parse(found.tensors)
        found.faults += found.parsed.faults + _rank_faults(found) + value_faults(found.tensors)
    if wait:
        found.settle()
    return found


def _rank_faults(found: AdapterFile) -> list[str]:
    """Ranks that differ from the configuration's: known without a model."""
    if found.method is None:
        return []
    several = bool(found.method.target_parameters)  # a stack of experts has the rank once for each
    faults = []
    for path, halves in found.parsed.pairs.items():
        if 0 not in halves or halves[0].dim() < 2:
            continue
        came, said = halves[0].shape[0], found.method.rank(path)
        if came != said and not (several and came % said == 0):
            faults.append(f"{path}: rank {came} in the file, {said} by {CONFIG}")
    return faults + _beside_faults(found.parsed, found.method)


def _beside_faults(parsed: Parsed, method: LoRA) -> list[str]:
    """Magnitudes and biases that the configuration promises and the file lacks, or the other way round."""
    faults = []
    for key, promised, name, group in (
        ("use_dora", method.use_dora, MAGNITUDE, parsed.magnitudes),
        ("lora_bias", method.lora_bias, BIAS, parsed.biases),
    ):
        if promised:
            faults += [f"{path}.{name}: missing, but {CONFIG} says {key}" for path in parsed.pairs if path not in group]
        else:
            faults += [f"{path}.{name}: in the file, but {CONFIG} does not say {key}" for path in group]
    return faults


def on_model(found: AdapterFile, method: LoRA, model: nn.Module) -> tuple[LoRA, Draft, list[str]]:
    modules = dict(walk(model))
    method = _for_model(method, found.parsed, modules)
    draft, faults = to_draft(found.parsed, method, model, modules)
    try:
        targets = method.targets(model, modules)
    except TargetError as error:
        return method, draft, [*faults, str(error)]
    named = set(targets)
    faults += [
        f"{path}: named by target_modules, but the file has no tensors for it"
        for path in targets
        if path not in found.parsed.pairs
    ]
    faults += _missing_rows(found, method)
    named |= {home for head, home in draft.tied.items() if head in named}
    faults += [f"{path}: in the file, but not named by target_modules" for path in draft.pairs if path not in named]
    faults += [
        f"{name}: trained in full according to {CONFIG}, but the file has no tensor for it"
        for name in _trained_in_full(method, targets, model)
        if name not in found.parsed.plain and not _under_another_name(name, found.parsed, model)
    ]
    return method, draft, faults


def _missing_rows(found: AdapterFile, method: LoRA) -> list[str]:
    asked = method.trainable_token_indices
    names = (
        list(asked)
        if isinstance(asked, Mapping)
        else []
        if found.parsed.tokens or asked is None
        else ["the input embeddings"]
    )
    return [
        f"{name}: rows are trained in full according to {CONFIG} (trainable_token_indices), but the file has none"
        for name in names
        if not any(matches([str(name)], path) for path in found.parsed.tokens)
    ]


def _for_model(method: LoRA, parsed: Parsed, modules: Mapping[str, nn.Module]) -> LoRA:
    """PEFT notes heads by every name that it knows ("classifier", "score"): keep those that the model or the file has."""
    kept = [
        name
        for name in method.modules_to_save or ()
        if any(f".{name}." in f".{key}." for key in parsed.plain) or any(matches([name], path) for path in modules)
    ]
    return replace(method, modules_to_save=kept or None)


def _trained_in_full(method: LoRA, targets: Iterable[str], model: nn.Module) -> list[str]:
    """The names of the parameters that a file of this configuration must hold besides its pairs: heads and biases."""
    heads = find_modules(model, method.modules_to_save) if method.modules_to_save else []
    names = [f"{path}.{name}" for path in heads for name, _ in model.get_submodule(path).named_parameters()]
    if method.bias == "lora_only":
        names += [f"{path}.bias" for path in targets if model.get_submodule(path)._parameters.get("bias") is not None]
    if method.bias == "all":
        names += [name for name, _ in model.named_parameters() if f".{name}".endswith(".bias")]
    return list(dict.fromkeys(names))


def _under_another_name(name: str, parsed: Parsed, model: nn.Module) -> bool:
    path, _, parameter = name.rpartition(".")
    return any(other in parsed.plain for other in shared_with(model, path, parameter))


def locate(source: str | Path) -> Path:
    """The local folder of an adapter: itself, or a download of a hub id ("owner/name"). Raises FileError."""
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a user who does not exist
        raise FileError(f"{str(source)[:200]!r} is no folder's name ({error}).") from error
    if there or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(source),
                allow_patterns=list(FILES),
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(
            f"{source!r} is no folder here, and the hub has no such adapter to offer ({reason}). Expected a folder with {CONFIG} "
            f"and {TENSORS}, or a hub id."
        ) from error
