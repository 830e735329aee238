"""What a format is: how its files are recognised, read to the hub and written from it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from lorakit.errors import FileError
from lorakit.store.files import Write
from lorakit.store.foreign.base import Base
from lorakit.store.foreign.hub import Adapter, Bundle
from lorakit.store.foreign.source import Source


@dataclass(frozen=True)
class Options:
    """What a file does not say of itself.

    alpha: the scaling's numerator, where the file holds none. enable_lora: which parts of a fused projection loralib's
    MergedLinear adapts. base: the model's module names. component: the part of a pipeline that is meant.
    """

    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    base: Base | None = None
    component: str | None = None


@dataclass
class Written:
    """What a format would write: files, each with what fills it, and notes for whoever reads the report."""

    files: dict[Path, Write]
    notes: list[str] = field(default_factory=list)


class Format(ABC):
    """One kind of adapter file. `read` and `write` raise a FileError that lists everything they cannot carry over."""

    name: ClassVar[str]
    what: ClassVar[str]  # a line for help and errors

    @abstractmethod
    def recognises(self, source: Source) -> bool:
        """Whether these keys are this format's."""

    @abstractmethod
    def read(self, source: Source, options: Options) -> Bundle:
        """The file's adapters in the hub's form."""

    @abstractmethod
    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """The files for `target`. Nothing is written yet, so that a fault leaves no file."""


def single(bundle: Bundle, name: str) -> Adapter:
    """The one adapter of a bundle. Raises FileError where there are several."""
    if len(bundle) > 1:
        raise FileError(
            f"{name} holds one model's adapter, and the source has {', '.join(bundle)}. Choose one with component."
        )
    return next(iter(bundle.values()))


def refuse(name: str, faults: list[str]) -> None:
    """Raise a FileError with everything that a format cannot hold, if there is anything."""
    if faults:
        raise FileError(f"{name} cannot hold all of this adapter exactly, so nothing was written:", faults)


def names_from(adapter: Adapter, name: str) -> dict[str, str]:
    """Hub key -> the key that the file of format `name` had, where the adapter came from one."""
    names = adapter.notes.get("names") if adapter.notes.get("from") == name else None
    return names if isinstance(names, dict) else {}
