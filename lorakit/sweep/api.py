"""`sweep`: adapters of different rank, alpha, learning rate, targets or seed, trained at once on one frozen base.

Each member's adapter is what training it alone gives: its own data order, loss, clip, schedule and AdamW (float32 losses agree to
1e-5). What is drawn while it trains, dropout of the method or of the base, is drawn for all rows together: same law, other masks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError, UsageError
from lorakit.run.hold import held
from lorakit.run.listen import Listener
from lorakit.run.recipe import Recipe
from lorakit.run.stamp import sources_of, stamp
from lorakit.sweep.members import Plan, plan_members
from lorakit.sweep.result import SweepResult, member_result
from lorakit.sweep.together import group_of, train_alone, train_together
from lorakit.train.world import join

AT_ONCE = 8


def sweep(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    variants: Sequence[Mapping[str, Any]] = (),
    seeds: Sequence[int] | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    at_once: int = AT_ONCE,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> SweepResult:
    """Train every combination of the varied values, and write one table of what came of it.

    vary: {"method.r": [1, 2, 4], "train.lr": [1e-4, 3e-4]}: keys of the recipe. variants: changes that belong together,
    {"method.target_modules": ["q_proj"], "method.r": 8} each, crossed with vary. seeds: of train.seed, crossed too. output: the
    sweep's folder (None = the recipe's), a run's folder a member in it, and sweep.csv, sweep.json. overrides: "train.epochs=1"
    each. at_once: the most adapters in one pass, which bounds its memory; 1 = ordinary runs, one after another.

    Members of one base, task and batch size share a pass; others come one after another, and what no pass can share (packing
    or the prefix cache asked for, fp16, text-to-image) is an ordinary run. A member whose folder holds its finished run is not
    repeated; one that broke off begins anew. A member whose loss is no number ends alone and is told as failed.
    Raises UsageError, RecipeError, DataError, ModelError as `train` does; OutputError where a member's folder holds another run
    (unless `overwrite`), or another sweep is at work in `output`.
    """
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise UsageError(f"at_once must be a whole number of at least 1, not {at_once!r}.")
    if join().size > 1:
        raise UsageError("a sweep trains its members in one process: start it in one.")
    listener = listener or Listener()
    root, plans = plan_members(recipe, vary or {}, variants, seeds, output, overrides)
    with held(root, "sweep"):
        return _trained(root, plans, at_once, overwrite, listener)


def _trained(root: Path, plans: Sequence[Plan], at_once: int, overwrite: bool, listener: Listener) -> SweepResult:
    waiting = [plan for plan in plans if not plan.done()]
    for plan in waiting:
        _check_free(plan, overwrite)
    if len(waiting) < len(plans):
        listener.note(f"{len(plans) - len(waiting)} of {len(plans)} are there already")
    left, named = len(waiting), {plan.name: plan for plan in waiting}
    stamps = {plan.name: stamp(sources_of(plan.recipe)) for plan in waiting}

    def finished(name: str) -> None:
        nonlocal left
        named[name].mark(stamps[name])
        left -= 1
        listener.note(f"{name} is done, {left} to go")

    for group in _groups(waiting, at_once):
        if len(group) == 1:
            train_alone(group[0].recipe, listener)
            finished(group[0].name)
        else:
            train_together({plan.name: plan.recipe for plan in group}, at_once, listener, finished)
    result = SweepResult(root, tuple(member_result(plan) for plan in plans), len(waiting))
    result.save()
    return result


def _check_free(plan: Plan, overwrite: bool) -> None:
    """Raise where a member's folder holds another finished run; what an unfinished one left is begun anew."""
    if plan.folder.summary.exists() and not overwrite:
        raise OutputError(
            f"{plan.folder.path} holds a run of another recipe, or of data that has changed since. Choose another output for "
            "the sweep, or replace it (--overwrite)."
        )


def _groups(plans: Sequence[Plan], at_once: int) -> list[list[Plan]]:
    groups: dict[str, list[Plan]] = {}
    for i, plan in enumerate(plans):
        key = None if at_once == 1 else group_of(plan.recipe)
        groups.setdefault(f"alone {i}" if key is None else key, []).append(plan)
    return list(groups.values())
