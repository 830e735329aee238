"""An adapter as a bank keeps it: for each layer its pair as stacks take it, checked to be one that batches can mix."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import EmbeddingKind, LeafKind, low_rank_kind
from lorakit.attach.method import Draft, Pair
from lorakit.core.delta import is_dense
from lorakit.core.largest import largest
from lorakit.errors import UsageError
from lorakit.store.block import together

HELD = ("A", "Bt", "gain", "shift")  # the fields of a Row that hold a tensor
LARGEST = 1e15  # of A's values: no activation makes an infinity of them in float32


@dataclass(slots=True)
class Row:
    """One layer's pair. A (r, in) and Bt (r, out), for an embedding (vocab, r) and (r, dim).

    gain: DoRA's, (out,), with which Bt is multiplied already; shift: what the bias gains, (out,).
    """

    A: Tensor
    Bt: Tensor
    scale: float
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.Bt.shape[0]

    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor for name in HELD if (tensor := getattr(self, name)) is not None)


@dataclass
class Rows:
    """All layers of an adapter: path -> Row. head: its own head's tensors by their names in the model, {} where it has none."""

    layers: dict[str, Row]
    head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The greatest that a product needs; an embedding is looked up."""
        return max((row.rank for row in self.layers.values()), default=0)

    def bytes(self) -> int:
        held = [tensor for row in self.layers.values() for tensor in row.tensors()] + list(self.head.values())
        return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in held}.values())


Modules = Mapping[str, nn.Module]  # a model's, by their names


def _kind(leaf: nn.Module) -> LeafKind | None:
    return low_rank_kind(plain(type(leaf)))


def to_rows(draft: Draft, modules: Modules, head: Mapping[str, Tensor], head_path: str | None = None) -> Rows:
    """The draft's layers on the model whose modules these are, in memory of their own. head: the tensors of the adapter's
    own head; head_path: the name of a classifier's.

    Raises UsageError with all that cannot be mixed.
    """
    _check([*_faults(draft, modules), *_in_head(draft, head_path)])
    with torch.no_grad():
        draft.move(together)
        layers = {path: _row(modules[path], pair, crossed=False) for path, pair in draft.pairs.items()}
        for path, home in draft.tied.items():
            if home in draft.pairs:
                layers[path] = _row(modules[path], draft.pairs[home], crossed=True)
        for path, group in draft.replaced.items():
            own = modules[path]._parameters["bias"]
            row = layers[path]
            change = group["bias"].detach() - own.detach().to(group["bias"])  # type: ignore[union-attr]
            row.shift = change if row.shift is None else row.shift + change
        _check(_too_large(layers, modules))
        if any(pair.magnitude is not None or pair.parts or pair.fixed_a is not None for pair in draft.pairs.values()):
            _move(layers)  # they were worked out from the draft's, and have taken their place
    return Rows(layers, dict(zip(head, together([*head.values()]), strict=True)))


def _move(layers: Mapping[str, Row]) -> None:
    """Put all rows into one piece of memory."""
    places = [
        (row, name, tensor) for row in layers.values() for name in HELD if (tensor := getattr(row, name)) is not None
    ]
    for (row, name, _), tensor in zip(places, together([tensor for _, _, tensor in places]), strict=True):
        setattr(row, name, tensor)


def _check(faults: list[str]) -> None:
    if faults:
        lines = "".join(f"\n  - {fault}" for fault in faults)
        raise UsageError(
            "requests of one batch cannot take this adapter beside others; merge it into a base of its own "
            f"(lorakit merge) and serve that:{lines}"
        )


def _in_head(draft: Draft, path: str | None) -> Iterator[str]:
    """A head computes the rows of its own adapter, in a copy that looks at no stack (lorakit.serve.heads)."""
    for inner in [*draft.pairs, *draft.tied]:
        if path is not None and (inner == path or inner.startswith(f"{path}.")):
            yield (
                f"{inner}: a low-rank pair in the classifier's head, which an adapter brings whole or not at all: train it "
                f"with modules_to_save=[{path!r}]"
            )


def _too_large(layers: Mapping[str, Row], modules: Modules) -> list[str]:
    """Values that make NaN: a row of another adapter is multiplied with these too, and the product with 0."""
    types = {path: _computed_in(row, modules[path]) for path, row in layers.items()}
    all_take = min([LARGEST, *(torch.finfo(dtype).max / 2 for dtype in set(types.values()))])
    if largest([tensor for row in layers.values() for tensor in row.tensors()]) <= all_take:
        return []
    return [
        f"{path}: values above {LARGEST:g} in A, or that are not finite in {types[path]}"
        for path, row in layers.items()
        if not all(tensor.to(types[path]).isfinite().all() for tensor in row.tensors()) or largest([row.A]) > LARGEST
    ]


def _computed_in(row: Row, leaf: Any) -> torch.dtype:
    """The type in which a layer multiplies a row."""
    weight = leaf._parameters["weight"]
    return weight.dtype if weight is not None and is_dense(weight) else row.Bt.dtype


def _faults(draft: Draft, modules: Modules) -> Iterator[str]:
    for path, group in draft.replaced.items():
        if path not in draft.pairs or set(group) != {"bias"}:
            yield f"{path}: {', '.join(group)} trained in full"
    for path in draft.raw:
        yield f"{path}: a parameter that its module reads itself"
    for path, inserts in draft.inserts.items():
        yield f"{path or 'the model'}: {', '.join(inserts)} computed there besides"
    for path in draft.tokens:
        yield f"{path}: rows of tokens trained in full"
    for path in draft.pairs:
        kind = _kind(modules[path])
        if kind is None or not kind.mixes:
            yield f"{path}: a {type(modules[path]).__name__}, whose update is no product of rows"
        elif isinstance(kind, EmbeddingKind) and modules[path].max_norm is not None:
            yield f"{path}: an embedding with max_norm"


def _row(leaf: Any, pair: Pair, *, crossed: bool) -> Row:
    kind: Any = _kind(leaf)
    A, Bt = (factor.detach() for factor in pair.factors())
    if crossed and kind.zero == "B":  # a head that takes the pair of the embedding whose weight it shares
        A, Bt = Bt, A.t()
    row = Row(A, Bt, pair.scale)
    if pair.bias is not None:
        row.shift = pair.bias.detach() * pair.scale
    if pair.magnitude is not None:
        magnitude = pair.magnitude.detach()
        weight = leaf._parameters["weight"].device
        norms = kind.norms(leaf, A.to(weight), Bt.to(weight), pair.scale).to(magnitude.device)
        row.gain = magnitude / norms.to(magnitude.dtype)
        row.Bt = Bt * row.gain.to(Bt.dtype)
        row.shift = None if row.shift is None else row.shift * row.gain.to(row.shift.dtype)
    return row
