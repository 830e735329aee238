"""What an adapter adds, layer by layer, as its file has it: `dW = scale * B A`, never multiplied out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit.attach.targets import layer_number
from lorakit.errors import FileError, UsageError
from lorakit.methods.lora import LoRA
from lorakit.methods.pissa import from_base
from lorakit.store.peft_config import CONFIG
from lorakit.store.read import AdapterFile, locate, read_folder

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Update:
    """The update of one weight matrix. a: (r, in), b: (out, r), in the file's type; a convolution's in has its kernel.

    kind: the type of matrix ("q_proj"): its path without the layer's number, as short as tells it from the others.
    path: the module's, with [n] after it for the n-th expert of a stack or group of a convolution.

    """

    path: str
    kind: str
    layer: int | None
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the factors, which bounds that of their product."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.b.shape[0], self.a.shape[1]

    @property
    def is_part(self) -> bool:
        """Whether it is one of several of one module."""
        return self.path.endswith("]")


@dataclass(frozen=True)
class Adapter:
    """An adapter read for analysis. notes: what of it the figures do not hold, in sentences."""

    source: str
    file: AdapterFile
    method: LoRA
    updates: tuple[Update, ...]
    notes: tuple[str, ...]


def read_adapter(source: str | Path) -> Adapter:
    """Read a PEFT folder (or hub id) whole, and check it.

    Raises FileError with every fault of the files, and UsageError where the files' pairs are not the update, or there are
    none.
    """
    file = read_folder(locate(source))
    if file.faults or file.method is None:
        hint = "" if file.folder.is_dir() else " Another program's file: lorakit convert makes a folder of it."
        raise FileError(f"the adapter in {file.folder} cannot be read.{hint}", file.faults)
    if from_base(file.method.init) is not None:
        raise UsageError(
            f"{source}: init_lora_weights = {file.method.init!r} says that the base was changed too, so that lora_A and lora_B "
            "are not the update. Load it with lorakit.load and write it with lorakit.save, which makes it an ordinary one."
        )
    if not file.parsed.pairs:
        raise UsageError(f"{source} has no low-rank pairs ({CONFIG} trains other things): there is no update to study.")
    return Adapter(str(source), file, file.method, tuple(_updates(file, file.method)), tuple(_notes(file)))


def _notes(file: AdapterFile) -> list[str]:
    parsed, notes = file.parsed, list[str]()
    if parsed.magnitudes:
        notes.append(
            "DoRA: the figures are of scale * B A; the magnitudes, which also turn and stretch W, are not in them."
        )
    beside = len(parsed.plain) + len(parsed.biases) + len(parsed.tokens)
    if beside:
        notes.append(
            f"{beside} tensors trained in full (heads, biases, token rows) are not low-rank updates: left out."
        )
    return notes


def _updates(file: AdapterFile, method: LoRA) -> Iterator[Update]:
    labels = kind_labels(list(file.parsed.pairs))
    for path, halves in sorted(file.parsed.pairs.items(), key=lambda pair: _natural(pair[0])):
        blocks = _blocks(halves, method.rank(path))
        for at, (a, b) in enumerate(blocks):
            name = path if len(blocks) == 1 else f"{path}[{at}]"
            yield Update(name, labels[path], layer_number(path, None), a, b, method.scaling(path))


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, whatever the file's order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _blocks(halves: Mapping[int, Tensor], r: int) -> list[tuple[Tensor, Tensor]]:
    """The (a, b) of one matrix each: one pair, or a stack's experts, or a convolution's groups (see store.peft_folder)."""
    a, b = halves[0].flatten(1), halves[1].flatten(1)
    if a.shape[0] != b.shape[1]:
        groups = a.shape[0] // b.shape[1]
        return list(zip(a.chunk(groups), b.chunk(groups), strict=True))
    experts = a.shape[0] // r if a.shape[0] > r and a.shape[0] % r == 0 else 1
    return [(a[e * r : (e + 1) * r], b[:, e::experts]) for e in range(experts)] if experts > 1 else [(a, b)]


def kind_labels(paths: Sequence[str]) -> dict[str, str]:
    """path -> its type of matrix: the path without its layer's number, cut to the fewest last parts that tell types apart.

    "model.layers.3.mlp.up_proj" -> "up_proj"; RoBERTa's "attention.output.dense" and its MLP's "output.dense" keep more.
    """
    patterns = {path: _NUMBER.sub(".*.", path, count=1) for path in paths}
    kinds = set(patterns.values())
    labels = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        labels[kind] = next(
            end for end in ends if sum(other == end or other.endswith("." + end) for other in kinds) == 1 or end == kind
        )
    return {path: labels[pattern] for path, pattern in patterns.items()}
