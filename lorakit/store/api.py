"""save and load: an attached adapter to a folder (PEFT's, where PEFT has the method), and back, bit for bit."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.attach.anatomy import module_at
from lorakit.attach.api import AttachReport, add, check_can_add
from lorakit.attach.host import Record, check_names, check_not_merged, find_host, host_of
from lorakit.attach.method import Draft
from lorakit.errors import UsageError
from lorakit.store.block import apart, together
from lorakit.store.convert import read_source
from lorakit.store.files import remove_files, write_together
from lorakit.store.layout import TENSORS
from lorakit.store.layouts import fit, layout_for
from lorakit.store.peft_config import CONFIG
from lorakit.store.read import locate


def save(
    model: nn.Module, folder: str | Path, name: str = "default", *, notes: Mapping[str, Any] | None = None
) -> Path:
    """Write adapter `name` as a folder (see lorakit.store.layouts): for LoRA PEFT's (config, tensors, README), with
    lorakit.json beside it.

    notes: further facts for lorakit.json (data, metrics of the run). All files are written beside their places and
    flushed before the first is put there, and lorakit.json, which holds the content's hash, is the first: a save cut off in
    between leaves the old adapter, or files that load refuses, never a mixture that it takes for one adapter.
    Raises OutputError where the disk is full or the folder not writable, UsageError on notes that JSON cannot hold.
    """

    host = host_of(model)
    with host.lock:
        check_not_merged(host)
        check_names(host, {name: 1.0})
        host.current()
        record = host.records[name]
        layout = layout_for(record.method, name)
        if any(tensor.is_meta for tensor in record.tensors()):
            raise UsageError(f"adapter {name!r} is on the meta device, where tensors have no values to save.")
        content = layout.files(model, record, notes or {})
    target = Path(folder).expanduser()
    write_together({target / file: partial(_fill, data=data) for file, data in content.items()})
    remove_files(
        [target / file for file in (CONFIG, TENSORS) if file not in content]
    )  # another layout's, saved here before
    return target


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def load(
    model: nn.Module,
    source: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    check_base: bool = True,
    component: str | None = None,
) -> AttachReport:
    """Load an adapter from its folder (PEFT's or lorakit's own) or a hub id, switch it on, and freeze the base.

    dtypes stay as in the file. The safetensors files of other programs (diffusers, kohya, ...) are recognised and taken as
    they are; component: which part of a pipeline's file is this model's ("unet"). Everything is checked first: a FileError
    lists every fault, and nothing is half-loaded. check_base: refuse an adapter whose lorakit.json names another base.
    """
    check_can_add(find_host(model), name)
    found = read_source(locate(source), model, component)
    method, draft = fit(found, model, check_base=check_base)
    _check_material(model, draft)
    draft.move(apart if trainable else together)  # the file's own memory goes, all of it
    meta = {**found.meta(), "source": str(source)}
    return add(model, Record(name, method, draft, trainable, meta))


def _check_material(model: nn.Module, draft: Draft) -> None:
    """An adapter's tensors follow their leaf's device; on the meta device their values would be lost."""
    for path in draft.paths():
        if any(own is not None and own.is_meta for own in module_at(model, path)._parameters.values()):
            raise UsageError(
                f"{path} is on the meta device (not loaded yet, or off-loaded), where the adapter's values would be lost. "
                "Load the model's weights onto a real device first."
            )
