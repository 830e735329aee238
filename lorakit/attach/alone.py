"""Operations that add to a sequence (prefixes, prompts): what stands aside for them, and how they may be switched on."""

from collections.abc import Collection, Mapping

from torch import nn

from lorakit.attach.host import Host, Record, find_host
from lorakit.attach.method import Draft
from lorakit.attach.operation import Operation
from lorakit.errors import AdapterError


def operations_on(model: nn.Module) -> list[Operation]:
    """The operations of the adapters that are on."""
    host = find_host(model)
    on = [] if host is None else [host.records[name] for name, strength in host.state.selection if strength]
    return [one for record in on for one in _operations(record.draft)]


def by_token(model: nn.Module) -> bool:
    """Whether no adapter that is on adds tokens or lets one reach another: what packing, the pruned last block, shared
    prefixes of a batch and the cache of frozen layers need."""
    return all(one.by_token for one in operations_on(model))


def taken(model: nn.Module) -> int:
    """How many positions of the sequence the adapters that are on take for themselves."""
    return sum(one.positions for one in operations_on(model))


def check_together(host: Host, chosen: Mapping[str, float] | Collection[str], *, routed: bool) -> None:
    """Raise AdapterError where adapters with virtual tokens would share a batch, be weighed, or stand beside one another."""
    strengths = chosen if isinstance(chosen, Mapping) else dict.fromkeys(chosen, 1.0)
    adding = {name: by for name, by in strengths.items() if by and _adds(host.records[name])}
    if not adding:
        return
    name = next(iter(adding))
    what = f"adapter {name!r} ({type(host.records[name].method).__name__}) puts virtual tokens into the sequence"
    if routed:
        raise AdapterError(
            f"{what}, so all rows of a batch have it or none: lorakit.route cannot mix it with others. Run one adapter at a "
            "time with lorakit.use."
        )
    if adding[name] != 1.0:
        raise AdapterError(f"{what}: it is on or off, and no strength of {adding[name]:g} is defined for it. Use 1.0.")
    if len(adding) > 1:
        raise AdapterError(
            f"{what}, and so does {list(adding)[1]!r}: which of them stands first is not defined. Switch one of them on, or "
            "attach both methods as one adapter."
        )


def _adds(record: Record) -> bool:
    return not all(one.by_token for one in _operations(record.draft))


def _operations(draft: Draft) -> list[Operation]:
    return [insert.operation for group in draft.inserts.values() for insert in group.values()]
