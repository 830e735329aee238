"""`lorakit.analyze`: the paper's rank study (section 7) on an adapter's files."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lorakit.analyze.against import amplification, open_model, top_directions, weights_of
from lorakit.analyze.compare import KINDS, WIDE, WIDEST, Grid, between_layers, compare, with_weight
from lorakit.analyze.result import Analysis, ModuleSpectrum
from lorakit.analyze.spectrum import (
    directions,
    effective_rank,
    energy,
    numerical_rank,
    rank_for,
    singular_values,
    stable_rank,
)
from lorakit.analyze.updates import Adapter, Update, read_adapter

Progress = Callable[[int, int], None]


def analyze(
    source: str | Path,
    other: str | Path | None = None,
    *,
    base: str | Path | nn.Module | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """The spectrum of every update of an adapter, and where its subspaces lie.

    source, other: PEFT folders or hub ids. other: the same task trained with another rank or seed, on the same base, whose
    subspaces are compared. base: the model that `source` is of (or its name, as `lorakit.models.load` takes it), for what
    needs W: how far each matrix moved, Table 7's amplification, Figure 8. progress: called with (done, total).

    Nothing is changed, neither files nor model; controls are drawn with fixed seeds of their own.
    Raises FileError on files that cannot be read or do not fit the base, UsageError on adapters that cannot be compared or
    whose pairs are not their update, ModelError on a base that cannot be loaded.
    """
    adapter = read_adapter(source)
    notes = list(adapter.notes)
    if base is not None:
        base = base if isinstance(base, nn.Module) else str(base)
        model: nn.Module | None = open_model(base, adapter)
    else:
        model = None
    modules = spectra(adapter.updates)
    zero = [one.path for one in modules if one.numerical_rank == 0]
    if zero:
        notes.append(f"{len(zero)} updates are zero (never trained?) and have no directions: {_some(zero)}.")
    second = None if other is None else read_adapter(other)
    matches, grids = ([], []) if second is None else compare(adapter.updates, second.updates)
    if second is not None:
        notes += [*(f"the second adapter: {note}" for note in second.notes), *_alone(adapter, second)]
    grids += between_layers((update, directions(update)) for update in adapter.updates)
    if model is not None:
        modules, more = _against(adapter, model, modules, notes, progress)
        grids += more
    return Analysis(
        source=str(source),
        other=None if other is None else str(other),
        base=None if base is None else type(base).__name__ if isinstance(base, nn.Module) else base,
        modules=tuple(modules),
        other_modules=() if second is None else tuple(spectra(second.updates)),
        matches=tuple(matches),
        grids=tuple(grids),
        notes=tuple(notes),
    )


def spectra(updates: Sequence[Update]) -> list[ModuleSpectrum]:
    """The figures of each update that need its singular values alone."""
    return [_spectrum(update, values) for update, values in zip(updates, singular_values(updates), strict=True)]


def _spectrum(update: Update, values: Tensor) -> ModuleSpectrum:
    return ModuleSpectrum(
        path=update.path,
        kind=update.kind,
        layer=update.layer,
        shape=update.shape,
        rank=update.rank,
        scaling=update.scale,
        values=tuple(values.tolist()),
        energy=tuple(energy(values).tolist()),
        norm=float(values.norm()),
        numerical_rank=numerical_rank(values),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        rank_90=rank_for(values, 0.9),
        rank_99=rank_for(values, 0.99),
    )


def _alone(first: Adapter, second: Adapter) -> Iterator[str]:
    """Which modules only one of two adapters has."""
    ours, theirs = ({update.path for update in one.updates} for one in (first, second))
    for paths, name in ((ours - theirs, "first"), (theirs - ours, "second")):
        if paths:
            yield f"only the {name} adapter has {_some(sorted(paths))}: not compared."


def _against(
    adapter: Adapter, model: nn.Module, modules: Sequence[ModuleSpectrum], notes: list[str], progress: Progress | None
) -> tuple[list[ModuleSpectrum], list[Grid]]:
    """The modules with their weights beside them, and Figure 8 of the middle layer of some types."""
    updates = {update.path: update for update in adapter.updates}
    weights = weights_of(model, updates)
    missing = [path for path in updates if path not in weights]
    if missing:
        notes.append(
            f"{len(missing)} modules have no plain matrix in the base (experts, groups, quantised weights) and are not held "
            f"against it: {_some(missing)}."
        )
    pictured = _middle(modules, weights)
    found: list[ModuleSpectrum] = []
    grids: list[Grid] = []
    for done, module in enumerate(modules):
        if module.path in weights and module.numerical_rank:
            update, weight = updates[module.path], weights[module.path]
            own = directions(update)
            rank = own.values.numel()
            wide = min(WIDE * rank, WIDEST, *weight.shape) if module.path in pictured else 1
            top = top_directions(weight, max(rank, wide))
            module = replace(module, against_base=amplification(own, weight, top))
            grids += [with_weight(update, own, top)] if module.path in pictured else []
        found.append(module)
        if progress is not None:
            progress(done + 1, len(modules))
    return found, grids


def _middle(modules: Sequence[ModuleSpectrum], weights: Container[str]) -> set[str]:
    """The path of the middle layer of each of the first types, as the paper shows layer 48 of 96."""
    kinds: dict[str, list[str]] = {}
    for one in modules:
        if one.path in weights and one.numerical_rank:
            kinds.setdefault(one.kind, []).append(one.path)
    return {paths[len(paths) // 2] for paths in list(kinds.values())[:KINDS]}


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
