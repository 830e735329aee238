"""PEFT's folder: adapter_config.json beside adapter_model.safetensors, or the adapter_model.bin of old versions."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lorakit.errors import FileError
from lorakit.store.files import Write, json_bytes
from lorakit.store.foreign.checked import config_faults, sound_notes
from lorakit.store.foreign.container import tensor_file
from lorakit.store.foreign.format import Format, Options, Written
from lorakit.store.foreign.hub import Adapter, Bundle, make_config, sort
from lorakit.store.foreign.plain import parameter_name, trained
from lorakit.store.foreign.source import Source
from lorakit.store.identity import content_hash
from lorakit.store.peft_config import CONFIG, DEFAULTS
from lorakit.store.peft_folder import PREFIX
from lorakit.store.read import EXTRA, FORMAT, TENSORS


class Peft(Format):
    """The hub itself, on disk; a folder for each component of a pipeline."""

    name: ClassVar[str] = "peft"
    what: ClassVar[str] = f"a folder with {CONFIG} and {TENSORS}"

    def recognises(self, source: Source) -> bool:
        return source.config is not None or any(key.startswith(PREFIX) for key in source.tensors)

    def read(self, source: Source, options: Options) -> Bundle:
        """The folder as it is. A file without its configuration needs options.alpha."""
        if source.config is None:
            return {"": _without_config(source, options)}
        kind = source.config.get("peft_type")
        faults = config_faults(source.config)
        faults += [] if kind == "LORA" else [f"peft_type {kind!r}: convert carries 'LORA'"]
        faults += [
            f"{key}: expected a key that begins with {PREFIX!r}" for key in source.tensors if not key.startswith(PREFIX)
        ]
        if faults:
            raise FileError(f"{source.path.parent}: this is no folder of a LoRA adapter:", faults)
        notes = sound_notes(source.extra.get("converted", {}), source.path.with_name(EXTRA))
        return {"": Adapter(source.config, source.tensors, notes, source.extra)}

    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """One folder, or where the source is a pipeline's file with several components a folder each below `target`."""
        if target.suffix in (".safetensors", ".bin", ".pt", ".gguf") or target.is_file():
            raise FileError(f"{target}: a PEFT adapter is a folder. Give the name of one.")
        files: dict[Path, Write] = {}
        for component, adapter in bundle.items():
            folder = target / component if len(bundle) > 1 else target
            files.update(folder_files(folder, adapter))
        return Written(files)


def folder_files(folder: Path, adapter: Adapter) -> dict[Path, Write]:
    """The files of one PEFT folder with lorakit.json, which holds the content's hash."""
    config = {**DEFAULTS, **adapter.config}
    extra: dict[str, Any] = {
        **adapter.extra,
        "format": FORMAT,
        "method": "lora",
        "adapter": content_hash(config, adapter.tensors),
        "converted": adapter.notes,
    }
    if not adapter.notes:
        del extra["converted"]
    return {
        folder / EXTRA: partial(_fill, data=json_bytes(extra, EXTRA)),
        folder / TENSORS: tensor_file(folder / TENSORS, adapter.tensors),
        folder / CONFIG: partial(_fill, data=json_bytes(config, CONFIG)),
    }


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _without_config(source: Source, options: Options) -> Adapter:
    """A tensors file alone: everything can be seen in it but alpha."""
    found = sort(source.tensors)
    more = trained((parameter_name(key) for key in found.others), set(found.pairs))
    faults = list(more.faults)
    faults += [
        f"{key}: means nothing without {CONFIG}" for key in found.others if "lora_" in key or "token_adapter" in key
    ]
    faults += [f"{path}: one half of its pair is missing" for path, halves in found.pairs.items() if len(halves) < 2]
    faults += [] if found.pairs else ["no pair of LoRA tensors in it"]
    if options.alpha is None:
        faults.append(f"its alpha stands in {CONFIG}, which is not beside it: give alpha (--alpha)")
    if faults or options.alpha is None:
        raise FileError(f"{source.path} cannot be read:", faults)
    ranks = {path: found.rank(path) for path in found.pairs}
    config = make_config(ranks, dict.fromkeys(ranks, options.alpha), **more.settings)
    return Adapter(config, source.tensors)
