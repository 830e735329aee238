"""save and load: an attached adapter to a PEFT folder, and back, bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.api import AttachReport, add, check_can_add
from lorakit.attach.host import Record, check_names, check_not_merged, find_host, host_of
from lorakit.attach.kinds import Conv1DKind, low_rank_kind
from lorakit.attach.targets import ALL_LINEAR, shortest_names
from lorakit.errors import UsageError
from lorakit.methods.lora import LoRA
from lorakit.store.card import model_card
from lorakit.store.files import write_atomically, write_json, write_text
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.peft_config import from_method
from lorakit.store.peft_folder import to_tensors
from lorakit.store.read import CONFIG, EXTRA, TENSORS, fit, locate, read_folder

FORMAT = 1  # of lorakit.json


def save(
    model: nn.Module, folder: str | Path, name: str = "default", *, notes: Mapping[str, Any] | None = None
) -> Path:
    """Write adapter `name` as a PEFT folder (config, tensors, README) with lorakit.json beside it.

    notes: further facts for lorakit.json (data, metrics of the run). Each file is written whole or not at all, the tensors
    first and lorakit.json, which holds the content's hash, last: a folder cut off in between is found out when it is read.
    Raises OutputError where the disk is full or the folder not writable.
    """
    from safetensors.torch import save_file

    host = host_of(model)
    with host.lock:
        check_not_merged(host)
        check_names(host, {name: 1.0})
        host.current()
        record = host.records[name]
        if not isinstance(record.method, LoRA):
            raise UsageError(f"adapter {name!r} is a {type(record.method).__name__}, which has no folder layout yet.")
        tensors = to_tensors(record.draft, model)
        config = _config(model, record, record.method)
    target = Path(folder).expanduser()
    extra = {
        **record.meta.get("extra", {}),
        **(notes or {}),
        "format": FORMAT,
        "method": record.method.name,
        "adapter": content_hash(config, tensors),
        "base": fingerprint(model, record.draft),
    }
    write_atomically(target / TENSORS, lambda path: save_file(tensors, str(path), metadata={"format": "pt"}))
    write_json(target / CONFIG, config)
    write_text(target / "README.md", model_card(config, tensors, extra))
    write_json(target / EXTRA, extra)
    return target


def _config(model: nn.Module, record: Record, method: LoRA) -> dict[str, Any]:
    raw = dict(record.meta.get("config", {}))
    paths = list(record.draft.pairs)
    targets = method.target_modules
    written = shortest_names(model, paths) if targets == ALL_LINEAR else targets
    config = from_method(method, written if isinstance(written, str) else list(written), raw)
    if config["base_model_name_or_path"] is None:
        config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    kinds = [low_rank_kind(plain(type(model.get_submodule(path)))) for path in paths]
    config["fan_in_fan_out"] = bool(kinds) and all(isinstance(kind, Conv1DKind) for kind in kinds)
    return config


def load(
    model: nn.Module,
    source: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    check_base: bool = True,
) -> AttachReport:
    """Load an adapter from a PEFT folder or a hub id, switch it on, and freeze the base. dtypes stay as in the file.

    Everything is checked first: a FileError lists every fault, and nothing is half-loaded. check_base: refuse an adapter
    whose lorakit.json names another base than this model.
    """
    check_can_add(find_host(model), name)
    found = read_folder(locate(source))
    method, draft = fit(found, model, check_base=check_base)
    meta = {"config": found.config, "extra": found.extra, "source": str(source)}
    return add(model, Record(name, method, draft, trainable, meta))
