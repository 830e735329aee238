"""What every way of writing an adapter to a folder is: which methods it is for, how it is written, read and checked."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.attach.host import Record
from lorakit.attach.method import Draft, Method
from lorakit.core.largest import largest
from lorakit.errors import Passing
from lorakit.store.header import read_tensors
from lorakit.store.identity import content_hash, content_of, digest_of, fingerprint, same_base, short

TENSORS = "adapter_model.safetensors"
EXTRA = "lorakit.json"
FORMAT = 1  # of lorakit.json
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass
class Stored:
    """An adapter's folder as read. extra: lorakit.json's content, {} where another program wrote the folder.

    config: what the files say of the method, as they say it; method: what that means, None where it is faulty.
    faults: in words, of the files alone; empty where they are sound.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    method: Method | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    pending: list[Callable[[], list[str]]] = field(default_factory=list, repr=False)

    def settle(self) -> None:
        """Wait for what is still being looked for, and add it to `faults`."""
        while self.pending:
            self.faults += self.pending.pop()()

    @property
    def kind(self) -> str:
        """What `inspect` calls it."""
        return f"lorakit ({'unknown' if self.method is None else self.method.name})"

    def replaced(self) -> Collection[str]:
        """Names of the base's parameters that it has tensors of its own for: they do not tell one base from another."""
        return ()

    def base(self) -> str | None:
        """The base's name, where the files tell it."""
        name = self.config.get("base_model_name_or_path") or self.extra.get("base_model")
        return None if name is None else str(name)

    def identity(self) -> str:
        """The content's hash, worked out anew."""
        return content_hash(self.config, self.tensors)

    def meta(self) -> dict[str, Any]:
        """What a loaded adapter keeps of its files, for the next save."""
        return {"config": self.config, "extra": self.extra}


class Layout(ABC):
    """One way of writing adapters. Stateless; `lorakit.store.layouts.LAYOUTS` is the table of all."""

    @abstractmethod
    def takes(self, method: Method) -> bool:
        """Whether adapters of this method are written in this layout."""

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Whether a folder is of this layout, damaged or not. The first in the table that says so reads it."""

    @abstractmethod
    def files(self, model: nn.Module, record: Record, notes: Mapping[str, Any]) -> dict[str, bytes]:
        """The content of each file by its name in the folder, in the order in which they are put in place: lorakit.json,
        which holds the content's hash, first. Raises UsageError on notes that JSON cannot hold."""

    @abstractmethod
    def read(self, folder: Path) -> Stored:
        """Read and check a folder on its own (no model). Faults are collected, never raised."""

    @abstractmethod
    def draft(self, found: Stored, method: Method, model: nn.Module) -> tuple[Method, Draft, list[str]]:
        """(method, draft, faults) of a sound folder on `model`: where it does not fit. method: the folder's, not None."""


def read_extra(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(content, faults) of lorakit.json; {} where there is none."""
    path = folder / EXTRA
    if not os.path.isfile(path):
        return {}, []
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [Passing(f"{EXTRA}: cannot be read ({error})")]
    except (ValueError, RecursionError) as error:
        return {}, [f"{EXTRA}: no JSON ({error})"]
    if not isinstance(extra, dict):
        return {}, [f"{EXTRA}: expected a JSON object"]
    version = extra.get("format", FORMAT)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT:
        return extra, [f"{EXTRA}: format {version!r}, and this lorakit reads up to {FORMAT}: install a newer one"]
    return extra, []


def read_tensors_of(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors, faults) of the folder's tensors file; a pickle in its place is refused."""
    path = folder / TENSORS
    if os.path.isfile(path):
        return read_tensors(path)
    pickle = next((name for name in PICKLES if os.path.isfile(folder / name)), None)
    if pickle is None:
        return {}, [f"{TENSORS}: not there"]
    return {}, [
        f"{pickle}: a pickle, which can run code when it is opened: refused. Save it as {TENSORS} where it came from"
    ]


def hash_faults_beside(found: Stored) -> Callable[[], list[str]]:
    """Begin `hash_faults` in a thread of its own (hashing holds no lock of the interpreter's); the call waits for it.

    found: of a layout whose identity is its configuration's and tensors'.
    """
    if not _names_hash(found):
        return list
    content = content_of(found.config, found.tensors)
    pool = ThreadPoolExecutor(1)
    later = pool.submit(digest_of, content)
    pool.shutdown(wait=False)
    return lambda: _hash_faults(found, later.result())


def hash_faults(found: Stored) -> list[str]:
    """A fault where lorakit.json names another hash than the content's."""
    return _hash_faults(found, found.identity()) if _names_hash(found) else []


def _names_hash(found: Stored) -> bool:
    return bool(found.extra.get("adapter") and found.config)


def _hash_faults(found: Stored, came: str) -> list[str]:
    expected = found.extra["adapter"]
    if came == expected:
        return []
    return [
        f"{EXTRA} names the hash {expected}, which this content does not have: files of two adapters (a save cut off "
        "half-way?), or changed by hand"
    ]


def value_faults(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors with NaN or infinity."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if isfinite(largest([*floating.values()])):
        return []
    bad = [key for key, tensor in floating.items() if not isfinite(largest([tensor]))]
    return [f"{key}: holds values that are not finite (NaN or infinity)" for key in bad]


def base_faults(found: Stored, model: nn.Module) -> list[str]:
    """A fault where lorakit.json names another base than `model`."""
    expected = found.extra.get("base")
    came = fingerprint(model, found.replaced()) if expected else None
    if came is None or same_base(came, expected):
        return []
    name = found.base() or "unnamed"
    how = "values" if short(came) == short(expected) else "names or shapes"
    return [
        f"it was trained on another base ({name}): its parameters have other {how} than this model's. Load that base, or pass "
        "check_base=False if you know better"
    ]
