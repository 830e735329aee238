"""Where an adapter's tensors stand: on its leaves, under which names, while it is on; in its draft while it is off."""

from collections.abc import Iterator

from torch import Tensor, nn

from lorakit.attach.kinds import low_rank_kind
from lorakit.attach.method import Draft, Pair, TokenRows
from lorakit.attach.site import LowRank, Slot

Holder = Pair | TokenRows | dict[str, Tensor]
EMPTY = Slot(None, {}, 0.0, {}, None, None)
FIELDS = {"A": "a", "Bt": "b", "magnitude": "magnitude", "bias": "bias", "fixed_a": "fixed_a", "fixed_bt": "fixed_b"}


def places_of(draft: Draft) -> Iterator[tuple[str, str, Holder]]:
    """(path, key, holder) of every tensor of a draft that stands on a leaf while the adapter is on."""
    for path, pair in draft.pairs.items():
        yield from ((path, name, pair) for name, _ in pair.held())
    for path, group in draft.raw.items():
        yield from ((path, name, pair) for pair in group.values() for name, _ in pair.held())
    for path, rows in draft.tokens.items():
        yield from ((path, name, rows) for name in ("indices", "rows"))
    for path, tensors in draft.replaced.items():
        yield from ((path, name, tensors) for name in tensors)
    for path, inserts in draft.inserts.items():
        yield from ((path, name, insert.tensors) for insert in inserts.values() for name in insert.tensors)


def attributes_of(slot: Slot, path: str, draft: Draft) -> Iterator[tuple[str, str, Holder]]:
    """(attribute on the leaf, key, holder) of every tensor that `slot` puts on its leaf."""
    home = draft.tied.get(path, path)
    if slot.low is not None:
        yield from _of_pair(slot.low, draft.pairs[home])
    for name, low in slot.raw.items():
        yield from _of_pair(low, draft.raw[path][name])
    if slot.rows is not None and slot.indices is not None:
        yield slot.rows, "rows", draft.tokens[home]
        yield slot.indices, "indices", draft.tokens[home]
    for name, attribute in slot.replaced.items():
        yield attribute, name, draft.replaced[path]
    for (_, names), insert in zip(slot.inserts, draft.inserts.get(path, {}).values(), strict=True):
        for name, attribute in names.items():
            yield attribute, name, insert.tensors


def _of_pair(low: LowRank, pair: Pair) -> Iterator[tuple[str, str, Holder]]:
    for name, place in FIELDS.items():
        attribute = getattr(low, place)
        if attribute is not None:
            yield attribute, name, pair


def read_of(holder: Holder, key: str) -> Tensor:
    return holder[key] if isinstance(holder, dict) else getattr(holder, key)


def note_in(holder: Holder, key: str, tensor: Tensor) -> None:
    if isinstance(holder, dict):
        holder[key] = tensor
    else:
        setattr(holder, key, tensor)


def slot_for(leaf: nn.Module, path: str, draft: Draft, strength: float, suffix: str) -> Slot:
    """What an adapter does at one leaf, under attribute names that end in `suffix` (of its place among those on)."""
    home = draft.tied.get(path, path)
    pair, low = draft.pairs.get(home), None
    if pair is not None:
        kind = low_rank_kind(type(leaf))
        if kind is None:
            raise TypeError(f"{path}: no kind is registered for {type(leaf).__name__}")
        crossed = (
            home != path and kind.zero == "B"
        )  # a head that takes the pair of the embedding whose weight it shares
        names = ("lora_At", kind.b_name) if crossed else (kind.a_name, kind.b_name)
        low = low_rank_at(pair, names, strength, suffix, crossed=crossed)
    raw = {
        name: low_rank_at(one, (f"lora_A_{name}", f"lora_Bt_{name}"), strength, suffix)
        for name, one in draft.raw.get(path, {}).items()
    }
    has_rows = home in draft.tokens
    return Slot(
        low,
        {name: f"lora_{name}{suffix}" for name in draft.replaced.get(path, {})},
        strength,
        raw,
        f"lora_rows{suffix}" if has_rows else None,
        f"lora_indices{suffix}" if has_rows else None,
        tuple(
            (insert.operation, {name: f"lora_{label}_{name}{suffix}" for name in insert.tensors})
            for label, insert in draft.inserts.get(path, {}).items()
        ),
    )


def low_rank_at(pair: Pair, names: tuple[str, str], strength: float, suffix: str, *, crossed: bool = False) -> LowRank:
    """How a pair's tensors are called on a leaf. names: of A and Bt, without the suffix."""
    a, b = names

    def called(name: str, tensor: Tensor | None) -> str | None:
        return None if tensor is None else f"{name}{suffix}"

    return LowRank(
        f"{a}{suffix}",
        f"{b}{suffix}",
        pair.scale * strength,
        pair.factor(strength),
        pair.dropout,
        strength,
        called(f"{a}_magnitude", pair.magnitude),
        called(f"{b}_bias", pair.bias),
        called(f"{a}_fixed", pair.fixed_a),
        called(f"{b}_fixed", pair.fixed_bt),
        pair.parts,
        crossed,
        pair.magnitude is None and pair.bias is None,
    )
