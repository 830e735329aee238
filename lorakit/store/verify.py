"""`verify`: every fault of an adapter's files at once, on their own or against a model."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lorakit.errors import FileError
from lorakit.store.layouts import fit, read
from lorakit.store.read import locate


@dataclass(frozen=True)
class Verification:
    """What verify found. faults: in words, empty where the adapter is sound."""

    source: str
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(source: str | Path, model: nn.Module | None = None, *, check_base: bool = True) -> Verification:
    """List every fault of an adapter folder (or hub id); with `model`, also where it does not fit that model.

    Nothing is attached and nothing of the file is executed.
    """
    try:
        found = read(locate(source))
        if model is not None:
            fit(found, model, check_base=check_base)
        faults = found.faults
    except FileError as error:
        faults = error.faults or [str(error)]
    return Verification(str(source), tuple(faults))
