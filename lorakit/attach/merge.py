"""Merging an adapter into the base and taking it out again: `W' = round(W + sum of strength * dW)`, added in float32.

No inference latency is left (LoRA, section 4.1): the leaves get their own class back. The base's values are kept in
host memory, so unmerge restores them bit for bit, however often; subtracting the update would drift with each cycle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import bare
from lorakit.attach.api import Names, selection_of
from lorakit.attach.host import KEY, Host, Merged, State, Untied, check_names, check_not_merged, host_of
from lorakit.attach.kinds import low_rank_kind
from lorakit.attach.site import Slot, raw_delta
from lorakit.attach.tied import tie_again, untie
from lorakit.core.delta import is_dense, wide
from lorakit.errors import AdapterError, UsageError


@dataclass(frozen=True)
class MergeReport:
    """What merge did. max_logit_difference: the largest change of a logit on the probe batch; None without a probe."""

    names: tuple[str, ...]
    modules: int
    max_logit_difference: float | None


def merge(
    model: nn.Module, names: Names = None, *, keep: bool = True, probe: Tensor | Mapping[str, Any] | None = None
) -> MergeReport:
    """Add adapters to the base's weights in place. names: as for `use`; None = those that are on.

    keep: hold the base's own values in memory, so that unmerge can restore them; False leaves a plain model behind, with
    every adapter gone. probe: a batch (tensor or mapping of inputs) on which logits before and after are compared.
    """
    host = host_of(model)
    with host.lock:
        check_not_merged(host)
        chosen = dict(host.state.selection) if names is None else selection_of(names)
        if not chosen or (names is None and host.state.route is not None):
            raise UsageError(
                "nothing to merge: no adapter is on for the whole batch. Name one: lorakit.merge(model, 'sql')."
            )
        check_names(host, chosen)
        host.check_undressable()
        before = host.state
        host.switch(State(tuple(chosen.items())))
        try:
            _check_inserts(host)
            reference = None if probe is None else _logits(model, probe)
            originals, untied = _write_merged(model, host)
        except BaseException:
            host.switch(before)
            raise
        host.switch(State())
        for leaf in host.leaves.values():
            bare(leaf)
        host.part()
        host.merged = Merged(tuple(chosen), before, originals, _guard(model, originals, host), untied)
        try:
            difference = None if reference is None else float((_logits(model, probe) - reference).abs().max())
        except BaseException:
            unmerge(model)
            raise
        if not keep:
            _drop(model, host)
        return MergeReport(tuple(chosen), len(originals), difference)


def unmerge(model: nn.Module) -> None:
    """Restore the base bit for bit and switch on what was on before the merge."""
    host = model.__dict__.get(KEY)
    if host is None or host.merged is None:
        raise AdapterError(
            "nothing is merged into this model that could be taken out (a merge with keep=False is final)."
        )
    with host.lock:
        merged: Merged = host.merged
        for path, group in merged.originals.items():
            for name, value in group.items():
                parameter = host.leaves[path]._parameters[name]
                if parameter is None or parameter.dtype != value.dtype or parameter.shape != value.shape:
                    found = None if parameter is None else f"{parameter.dtype} {tuple(parameter.shape)}"
                    raise AdapterError(
                        f"{path}.{name} was {value.dtype} {tuple(value.shape)} when it was merged and is {found} now: the "
                        "base cannot be restored bit for bit. Cast the model back, or load the base anew."
                    )
        for path, group in merged.originals.items():
            _write(host.leaves[path], group)
        tie_again(host, merged.untied)
        for handle in merged.handles:
            handle.remove()
        host.merged = None
        host.dress(model)
        host.switch(merged.before)


def _write_merged(model: nn.Module, host: Host) -> tuple[dict[str, dict[str, Tensor]], Untied]:
    """Write into the base what the adapters that are on make of it, leaf by leaf; returns what stood there.

    path -> {parameter name: value, in host memory}. When something fails, the base is as it was.
    """
    changed = {path: _changed(site.active) for path, site in host.sites.items()}
    for path, names in changed.items():
        _check_mergeable(host.leaves[path], path, names, host.sites[path].active)
    before: dict[str, dict[str, Tensor]] = {}
    untied = Untied()
    together = _written_once(model, host, changed)
    try:
        untie(model, host, [place for place in _places(changed) if place not in together], untied)
        for path, names in changed.items():
            mine = [name for name in names if together.get((path, name), True)]
            if mine:
                leaf = host.leaves[path]
                values = {name: _merged_value(leaf, host.sites[path].active, name) for name in mine}
                before[path] = {name: leaf._parameters[name].detach().to("cpu", copy=True) for name in mine}  # type: ignore[union-attr]
                _write(leaf, values)
    except BaseException:
        for path, values in before.items():
            _write(host.leaves[path], values)
        tie_again(host, untied)
        raise
    return before, untied


def _places(changed: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    return [(path, name) for path, names in changed.items() for name in names]


def _written_once(model: nn.Module, host: Host, changed: Mapping[str, list[str]]) -> dict[tuple[str, str], bool]:
    """The places of shared parameters that stay shared, since every adapter that is on is tied there as they are.

    place -> whether its leaf is the one that writes the new value.
    """
    found: dict[tuple[str, str], bool] = {}
    drafts = [host.records[name].draft for name, _ in host.state.selection]
    for draft in drafts:
        for head, home in draft.tied.items():
            others = [other for other in drafts if other.tied.get(head) != home and {head, home} & set(other.paths())]
            if host.leaves[head]._parameters["weight"] is host.leaves[home]._parameters["weight"] and not others:
                found[home, "weight"], found[head, "weight"] = True, False
    return {place: first for place, first in found.items() if place[1] in changed.get(place[0], ())}


def _changed(active: tuple[Slot, ...]) -> list[str]:
    """The names of a leaf's parameters that its active adapters change."""
    names = {name for slot in active for name in (*slot.replaced, *slot.raw)}
    lows = [slot.low for slot in active if slot.low is not None]
    if lows or any(slot.rows is not None for slot in active):
        names.add("weight")
    if any(low.bias is not None for low in lows):
        names.add("bias")
    return sorted(names)


def _check_inserts(host: Host) -> None:
    for name, _ in host.state.selection:
        record = host.records[name]
        if record.draft.inserts:
            raise AdapterError(
                f"{name!r} ({record.method.name}) computes something of its own at {next(iter(record.draft.inserts))!r}: "
                "that is no change of a weight, and cannot be merged into one. Use it unmerged."
            )


def _check_mergeable(leaf: nn.Module, path: str, names: list[str], active: tuple[Slot, ...]) -> None:
    for name in names:
        parameter = leaf._parameters.get(name)
        if parameter is None and name == "bias" and all(name not in slot.replaced for slot in active):
            raise AdapterError(
                f"{path} has no bias, so the bias of its adapter (lora_bias) has nothing to be merged into. Use it unmerged."
            )
        if parameter is not None and not is_dense(parameter):
            raise AdapterError(
                f"{path}.{name} is quantised ({type(parameter).__name__}, {parameter.dtype}): merging would round the update "
                "to the quantised values. Load the base unquantised, load the adapter there, and merge that."
            )


def _merged_value(leaf: nn.Module, active: tuple[Slot, ...], name: str) -> Tensor:
    """A parameter as the active adapters make it, in float32 where something is added."""
    replaced = any(name in slot.replaced for slot in active)
    value: Tensor = getattr(leaf, name) if replaced else leaf._parameters[name]  # type: ignore[assignment]
    raws = [slot.raw[name] for slot in active if name in slot.raw]
    if raws:
        dtype = wide(value.dtype)
        total = value.detach().to(dtype, copy=True)
        for low in raws:
            total += raw_delta(leaf, leaf._lk_site, name, low, dtype).detach()  # type: ignore[arg-type]
        return total
    kind = low_rank_kind(type(leaf))
    if name == "weight" and kind is not None:
        return kind.merged_weight(leaf, active, value)
    if name == "bias" and kind is not None:
        return kind.merged_bias(leaf, active, value)
    return value.detach()


@torch.no_grad()
def _write(leaf: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a leaf's own parameters in place, rounded to their type.

    Autograd sees the change (it would not through `.data`): a backward pass of an earlier forward raises.
    """
    for name, value in values.items():
        parameter = leaf._parameters[name]
        if parameter is not None:
            parameter.copy_(value)


def _guard(model: nn.Module, originals: dict[str, dict[str, Tensor]], host: Host) -> list[Any]:
    modules = [model] + [host.leaves[path] for path in originals]
    return [module.register_load_state_dict_pre_hook(_refuse_load) for module in modules]  # type: ignore[no-untyped-call]


def _refuse_load(*args: Any) -> None:
    raise AdapterError(
        "an adapter is merged into this model: loading a state dict now would be undone by unmerge, or merged twice. "
        "Call lorakit.unmerge(model) first."
    )


def _drop(model: nn.Module, host: Host) -> None:
    if host.merged is not None:
        for handle in host.merged.handles:
            handle.remove()
    del model.__dict__[KEY]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(host.flags.get(name, parameter.requires_grad))


@torch.no_grad()
def _logits(model: nn.Module, probe: Tensor | Mapping[str, Any] | None) -> Tensor:
    """The model's logits on the probe, in evaluation mode, as float32."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        out = model(**probe) if isinstance(probe, Mapping) else model(probe)
    finally:
        for module, training in modes.items():
            module.training = training
    if isinstance(out, Tensor):
        return out.float()
    logits = out.get("logits", None) if isinstance(out, Mapping) else getattr(out, "logits", None)
    chosen: Tensor = out[0] if logits is None else logits
    return chosen.float()
