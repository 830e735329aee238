"""The table of layouts: which one writes a method, which one reads a folder, and what is checked of each alike.

A new way of writing adapters is a class in a module of its own (see lorakit.store.layout) and one entry in PARTS.
"""

from pathlib import Path

from torch import nn

from lorakit.attach.method import Draft, Method
from lorakit.errors import FileError, UsageError
from lorakit.store.layout import Layout, Stored, base_faults
from lorakit.store.own import Own
from lorakit.store.peft_lora import PeftLora
from lorakit.store.peft_prompt import PeftPrompt
from lorakit.store.several import SeveralLayout

PARTS: tuple[Layout, ...] = (PeftPrompt(), Own(), PeftLora())
"""The layouts of one method each, asked in this order, in writing and in reading. PeftLora, which recognises whatever is
left, is the last; a layout of another of PEFT's methods (its peft_type in adapter_config.json) stands before Own."""
LAYOUTS: tuple[Layout, ...] = (SeveralLayout(PARTS), *PARTS)


def layout_for(method: Method, name: str) -> Layout:
    """The layout that writes `method`. name: the adapter's, for the message. Raises UsageError where there is none."""
    for one in LAYOUTS:
        if one.takes(method):
            return one
    raise UsageError(f"adapter {name!r} is a {type(method).__name__}, which has no folder layout.")


def layout_of(folder: Path) -> Layout:
    """The layout that a folder is in."""
    return next(one for one in LAYOUTS if one.recognises(folder))


def read(folder: Path, *, wait: bool = True) -> Stored:
    """Read and check an adapter's folder on its own, whatever its method. Faults are collected, never raised.

    wait: for the hash of the content; `fit`, and `Stored.settle`, do where this does not.
    """
    found = layout_of(folder).read(folder)
    if wait:
        found.settle()
    return found


def fit(found: Stored, model: nn.Module, *, check_base: bool) -> tuple[Method, Draft]:
    """The method and draft of a read folder on `model`. Raises FileError with every fault of the file and of the fit.

    The draft's tensors are views of what was read: who keeps them copies them first (lorakit.store.block).
    """
    more: list[str] = []
    drafted: tuple[Method, Draft] | None = None
    if found.method is not None and found.tensors:
        method, draft, more = layout_of(found.folder).draft(found, found.method, model)
        more += base_faults(found, model) if check_base else []
        drafted = method, draft
    found.settle()
    faults = found.faults + more
    if drafted is not None and not faults:
        return drafted
    what = "cannot be loaded" if found.faults else f"does not fit this {type(model).__name__}"
    raise FileError(f"the adapter in {found.folder} {what}:", faults)
