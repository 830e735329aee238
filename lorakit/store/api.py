"""save and load: an attached adapter to a PEFT folder, and back, bit for bit."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.api import AttachReport, add, check_can_add
from lorakit.attach.host import Record, check_names, check_not_merged, find_host, host_of
from lorakit.attach.kinds import Conv1DKind, EmbeddingKind, low_rank_kind
from lorakit.attach.method import Draft
from lorakit.attach.targets import ALL_LINEAR, shortest_names
from lorakit.errors import UsageError
from lorakit.methods.lora import LoRA
from lorakit.store.card import model_card
from lorakit.store.convert import read_source
from lorakit.store.files import json_bytes, write_together
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.peft_config import CONFIG, from_method
from lorakit.store.peft_folder import to_tensors
from lorakit.store.read import EXTRA, FORMAT, TENSORS, fit, locate


def save(
    model: nn.Module, folder: str | Path, name: str = "default", *, notes: Mapping[str, Any] | None = None
) -> Path:
    """Write adapter `name` as a PEFT folder (config, tensors, README) with lorakit.json beside it.

    notes: further facts for lorakit.json (data, metrics of the run). All files are written beside their places and
    flushed before the first is put there, and lorakit.json, which holds the content's hash, is the first: a save cut off in
    between leaves the old adapter, or files that load refuses, never a mixture that it takes for one adapter.
    Raises OutputError where the disk is full or the folder not writable, UsageError on notes that JSON cannot hold.
    """
    from safetensors.torch import save as serialise

    host = host_of(model)
    with host.lock:
        check_not_merged(host)
        check_names(host, {name: 1.0})
        host.current()
        record = host.records[name]
        if not isinstance(record.method, LoRA):
            raise UsageError(f"adapter {name!r} is a {type(record.method).__name__}, which has no folder layout yet.")
        if any(tensor.is_meta for tensor in record.tensors()):
            raise UsageError(f"adapter {name!r} is on the meta device, where tensors have no values to save.")
        tensors = to_tensors(record.draft, model, record.method)
        config = _config(model, record, record.method)
    target = Path(folder).expanduser()
    replaced = {f"{path}.{key}" for path, group in record.draft.replaced.items() for key in group}
    extra = {
        **record.meta.get("extra", {}),
        **(notes or {}),
        "format": FORMAT,
        "method": record.method.name,
        "adapter": content_hash(config, tensors),
        "base": fingerprint(model, replaced),
    }
    content = {
        EXTRA: json_bytes(extra, "notes"),
        TENSORS: serialise(tensors, metadata={"format": "pt"}),
        CONFIG: json_bytes(config, CONFIG),
        "README.md": model_card(config, tensors, extra).encode(errors="replace"),
    }
    write_together({target / file: partial(_fill, data=data) for file, data in content.items()})
    return target


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


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


def load(
    model: nn.Module,
    source: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    check_base: bool = True,
    component: str | None = None,
) -> AttachReport:
    """Load an adapter from a PEFT folder or a hub id, switch it on, and freeze the base. dtypes stay as in the file.

    The safetensors files of other programs (diffusers, kohya, ...) are recognised and taken as they are; component: which
    part of a pipeline's file is this model's ("unet"). Everything is checked first: a FileError lists every fault, and
    nothing is half-loaded. check_base: refuse an adapter whose lorakit.json names another base than this model.
    """
    check_can_add(find_host(model), name)
    found = read_source(locate(source), model, component)
    method, draft = fit(found, model, check_base=check_base)
    _check_material(model, draft)
    meta = {"config": found.config, "extra": found.extra, "source": str(source)}
    return add(model, Record(name, method, draft, trainable, meta))


def _check_material(model: nn.Module, draft: Draft) -> None:
    """An adapter's tensors follow their leaf's device; on the meta device their values would be lost."""
    for path in draft.paths():
        if any(own is not None and own.is_meta for own in model.get_submodule(path)._parameters.values()):
            raise UsageError(
                f"{path} is on the meta device (not loaded yet, or off-loaded), where the adapter's values would be lost. "
                "Load the model's weights onto a real device first."
            )
