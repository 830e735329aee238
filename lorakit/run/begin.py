"""Begin a run from another's adapter: the paper's MRPC, RTE and STS-B start from the adapter of MNLI (Hu et al. 2021, 5.1)."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.api import adapters, detach, use
from lorakit.errors import FileError, RecipeError
from lorakit.run.subject import adapter_folder
from lorakit.store.api import load
from lorakit.store.identity import fingerprint, same_base
from lorakit.store.peft_config import CONFIG
from lorakit.store.read import TENSORS, AdapterFile, read_folder

_OTHER = "lorakit.run.begin"  # the other adapter's name while it is read
_PREFIX = "base_model.model."


def begin_from(model: nn.Module, source: str | Path, name: str) -> None:
    """Copy the low-rank part of the adapter in `source` into the fresh adapter `name` of `model`.

    source: a run's folder, an adapter's own or a hub id. A head or biases that it holds stay behind: they are of its task.
    Raises FileError where its files are damaged or of another base, RecipeError where its layers, ranks or scaling are not
    those of `name`; the model is then as it was.
    """
    found = read_folder(adapter_folder(source))
    heads = {key.removeprefix(_PREFIX) for key in found.tensors if not _low_rank(key)}
    base = found.extra.get("base")
    if not found.faults and base is not None and not same_base(base, fingerprint(model, heads)):
        found.faults.append("it was trained on another base than this model")
    if found.faults:
        raise FileError(f"the adapter in {source} cannot be begun from:", found.faults)
    with tempfile.TemporaryDirectory() as scratch:
        _write_low_rank(found, Path(scratch))
        load(model, scratch, _OTHER, trainable=True)
    try:
        faults = _differences(model, name)
        if faults:
            raise RecipeError(
                f"start_from: {source} does not fit the recipe's method (set that as it was there):\n"
                + "\n".join(f"  - {fault}" for fault in faults)
            )
        theirs = _tensors(model, _OTHER)
        with torch.no_grad():
            for key, tensor in _tensors(model, name).items():
                tensor.copy_(theirs[key])
    finally:
        use(model, name)
        detach(model, _OTHER)


def _low_rank(key: str) -> bool:
    return ".lora_" in key


def _write_low_rank(found: AdapterFile, folder: Path) -> None:
    from safetensors.torch import save_file

    config: dict[str, Any] = {**found.config, "modules_to_save": None, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file({key: tensor for key, tensor in found.tensors.items() if _low_rank(key)}, folder / TENSORS)


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's own parameters by full name, without those that stand for one of the base's (`lora_bias`: a head's)."""
    with use(model, name):
        own = {key: tensor for key, tensor in model.named_parameters() if _low_rank(key)}
    return {key: tensor for key, tensor in own.items() if not _replaces(model, key)}


def _replaces(model: nn.Module, key: str) -> bool:
    path, _, leaf = key.rpartition(".")
    return leaf.removeprefix("lora_") in model.get_submodule(path)._parameters


def _differences(model: nn.Module, name: str) -> list[str]:
    """What of the other adapter is not as in `name`."""
    known: dict[str, Any] = {one: adapters(model)[one].method for one in (name, _OTHER)}
    ours, theirs = _tensors(model, name), _tensors(model, _OTHER)
    faults = [f"{key}: there, not here" for key in sorted(theirs.keys() - ours.keys())]
    faults += [f"{key}: here, not there" for key in sorted(ours.keys() - theirs.keys())]
    for key in sorted(ours.keys() & theirs.keys()):
        path = key.rpartition(".")[0]
        scales = [known[one].scaling(path) for one in (_OTHER, name)]
        if ours[key].shape != theirs[key].shape:
            faults.append(f"{key}: {tuple(theirs[key].shape)} there, {tuple(ours[key].shape)} here")
        elif scales[0] != scales[1]:
            faults.append(f"{path}: scaling {scales[0]:g} there, {scales[1]:g} here")
    return faults[:5]
