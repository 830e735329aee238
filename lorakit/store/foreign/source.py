"""Opening a file of unknown kind: its container is told by its first bytes, and a pickle is read as tensors alone."""

import json
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import FileError
from lorakit.store.header import read_tensors
from lorakit.store.peft_config import CONFIG
from lorakit.store.read import EXTRA, TENSORS

PICKLED = "adapter_model.bin"
DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")


@dataclass(frozen=True)
class Source:
    """One file's content. container: safetensors, pickle or gguf.

    metadata: what stands in the file's header. config: the adapter_config.json beside it. extra: the lorakit.json beside
    it. wrapper: the key under which a pickle held its tensors. left_out: what it held besides them.
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    wrapper: str | None = None
    left_out: tuple[str, ...] = ()


def open_sources(path: Path) -> dict[str, Source]:
    """{"": the file}, or a pipeline's components by name where `path` is a folder of adapter folders.

    Raises FileError on what is missing, damaged, foreign or malicious; nothing is executed.
    """
    if path.is_file():
        return {"": _open_file(path)}
    if not path.is_dir():
        raise FileError(f"{path} is not there: expected an adapter's folder or file.")
    if (path / CONFIG).is_file():
        return {"": _open_folder(path)}
    parts = {one.name: _open_folder(one) for one in sorted(path.iterdir()) if (one / CONFIG).is_file()}
    if parts:
        return parts
    return {"": _open_file(_only_file(path))}


def _only_file(folder: Path) -> Path:
    for name in (*DIFFUSERS, TENSORS, PICKLED):
        if (folder / name).is_file():
            return folder / name
    files = [one for one in sorted(folder.iterdir()) if one.suffix in ENDINGS and one.is_file()]
    if len(files) != 1:
        found = ", ".join(one.name for one in files[:8]) or "none"
        raise FileError(
            f"{folder} is no adapter's folder: expected {CONFIG} in it, or one file of tensors; it has {found}."
        )
    return files[0]


def _open_folder(folder: Path) -> Source:
    path = next((folder / name for name in (TENSORS, PICKLED) if (folder / name).is_file()), None)
    if path is None:
        raise FileError(f"{folder} has {CONFIG}, but neither {TENSORS} nor {PICKLED}.")
    return _open_file(path)


def _open_file(path: Path) -> Source:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error}).") from error
    if head == b"GGUF":
        return _open_gguf(path)
    config, extra = _beside(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        tensors, wrapper, left_out = read_pickle(path)
        return Source(path, "pickle", tensors, {}, config, extra, wrapper, left_out)
    tensors, faults = read_tensors(path)
    if faults:
        raise FileError(f"{path} cannot be read:", faults)
    return Source(path, "safetensors", tensors, _metadata(path), config, extra)


def _beside(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The adapter_config.json and the lorakit.json of a PEFT folder's file."""
    if path.name not in (TENSORS, PICKLED) or not path.with_name(CONFIG).is_file():
        return None, {}
    extra = path.with_name(EXTRA)
    return read_json(path.with_name(CONFIG)), read_json(extra) if extra.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


def _metadata(path: Path) -> dict[str, Any]:
    """The texts in a safetensors header, which `read_tensors` has checked."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(length)).get("__metadata__", {})
    return dict(found)


def read_pickle(path: Path) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """(tensors, wrapper, left out) of an old .bin or .pt file, read with `weights_only`: nothing in it is called.

    Raises FileError on a file that wants more than tensors, is damaged, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old types of storage
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets a damaged file with errors of any type
        raise FileError(f"{path} cannot be read as tensors alone: {_why(error)}") from error
    wrapper = _wrapper(content)
    inner = content[wrapper] if wrapper else content
    if not isinstance(inner, Mapping) or not inner:
        raise FileError(f"{path} holds {_kind(inner)}, where names of tensors were expected.")
    tensors, faults = _tensors(inner, path.stat().st_size)
    if faults:
        raise FileError(f"{path} holds more than named tensors:", faults)
    left_out = tuple(str(key) for key in content if key != wrapper) if wrapper else ()
    return tensors, wrapper, left_out


def _why(error: Exception) -> str:
    called = re.search(r"GLOBAL (\S+)", str(error))
    if called:
        return f"it asks for {called[1]}, which is no part of a tensor. Such a file can run code when opened: refused."
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"it is damaged, truncated or no file of tensors ({first[:200]})."


def _wrapper(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return None
    return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)


def _kind(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _tensors(content: Mapping[Any, Any], size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with memory of their own. A view that claims more than the file's bytes would fill the memory."""
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    for key, value in content.items():
        if not isinstance(key, str) or not key.isprintable():
            faults.append(f"{key!r:.80}: no name of a tensor")
        elif isinstance(value, int | float) and key.endswith(".alpha"):
            tensors[key] = torch.tensor(float(value))
        elif not isinstance(value, Tensor):
            faults.append(f"{key}: a {type(value).__name__}")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            faults.append(f"{key}: no dense tensor")
        elif value.numel() * value.element_size() > size:
            faults.append(f"{key}: {list(value.shape)} is more than the whole file holds")
        else:
            tensors[key] = value.detach().contiguous().clone()
    return tensors, faults


def _open_gguf(path: Path) -> Source:
    from lorakit.store.foreign.gguf_file import read_gguf

    tensors, metadata = read_gguf(path)
    return Source(path, "gguf", tensors, metadata)
