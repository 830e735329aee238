"""Merging an adapter into the base and taking it out again: `W' = round(W + sum of strength * dW)`, added in float32.

No inference latency is left (LoRA, section 4.1): the leaves get their own class back. The base's values are kept in
host memory, so unmerge restores them bit for bit, however often; subtracting the update would drift with each cycle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import bare, wear
from lorakit.attach.anatomy import shared_with
from lorakit.attach.api import Names, selection_of
from lorakit.attach.host import KEY, Host, Merged, State, check_names, check_not_merged, host_of
from lorakit.attach.kinds import low_rank_kind
from lorakit.core.delta import wide
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
        reference = None if probe is None else _logits(model, probe)
        try:
            values = _merged_values(model, host)
        except BaseException:
            host.switch(before)
            raise
        originals = _write(host, values)
        host.switch(State())
        for leaf in host.leaves.values():
            bare(leaf)
        host.merged = Merged(tuple(chosen), before, originals, _guard(model, originals, host))
        difference = None if reference is None else float((_logits(model, probe) - reference).abs().max())
        if not keep:
            _drop(model, host)
        return MergeReport(tuple(chosen), len(values), difference)


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
                if parameter is None or parameter.dtype != value.dtype:
                    found = None if parameter is None else parameter.dtype
                    raise AdapterError(
                        f"{path}.{name} was {value.dtype} when it was merged and is {found} now: the base cannot be "
                        "restored bit for bit. Cast the model back, or load the base anew."
                    )
        _write(host, merged.originals)
        for handle in merged.handles:
            handle.remove()
        host.merged = None
        for path, site in host.sites.items():
            wear(host.leaves[path], site, host._replaced_names(path))
        host.switch(merged.before)


def _merged_values(model: nn.Module, host: Host) -> dict[str, dict[str, Tensor]]:
    """path -> {parameter: the value that it takes}, from the adapters that are on. Nothing is written yet."""
    values: dict[str, dict[str, Tensor]] = {}
    for path, site in host.sites.items():
        leaf = host.leaves[path]
        changed: dict[str, Tensor] = {}
        for name in sorted({name for slot in site.active for name in slot.replaced}):
            changed[name] = getattr(leaf, name).detach()
        if any(slot.low is not None for slot in site.active):
            weight = changed.get("weight", leaf._parameters["weight"])
            changed["weight"] = _add_updates(leaf, site.active, weight)  # type: ignore[arg-type]
        for name, value in changed.items():
            _check_unshared(model, path, name)
            own = leaf._parameters[name]
            changed[name] = value if own is None else value.to(own.dtype)
        if changed:
            values[path] = changed
    return values


def _add_updates(leaf: nn.Module, active: tuple[Any, ...], weight: Tensor) -> Tensor:
    kind = low_rank_kind(type(leaf))
    dtype = wide(weight.dtype)
    total = weight.detach().to(dtype, copy=True)
    for slot in active:
        if slot.low is not None and kind is not None:
            A, Bt = getattr(leaf, slot.low.a).detach(), getattr(leaf, slot.low.b).detach()
            total += kind.weight_delta(A, Bt, slot.low.scale, dtype)
    return total


def _check_unshared(model: nn.Module, path: str, name: str) -> None:
    others = shared_with(model, path, name)
    if others:
        raise AdapterError(
            f"{path}.{name} is shared with {', '.join(others)} (tied weights): merging would change both. Untie them first, "
            f"by giving {path} a copy of its own: module.{name} = torch.nn.Parameter(module.{name}.clone())."
        )


def _write(host: Host, values: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Write values into the base's parameters in place; returns what stood there."""
    before: dict[str, dict[str, Tensor]] = {}
    for path, group in values.items():
        before[path] = {}
        for name, value in group.items():
            parameter = host.leaves[path]._parameters[name]
            if parameter is not None:
                before[path][name] = parameter.detach().to("cpu", copy=True)
                parameter.data.copy_(value)
    return before


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
