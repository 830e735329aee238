"""Which types of matrix, at which rank, for a number of parameters: Table 5's question (Hu et al. 2021, section 7.1), answered by
a short sweep on the user's own data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import TargetError, UsageError
from lorakit.evaluate import METRICS
from lorakit.methods.lora import LoRA
from lorakit.plan.source import find
from lorakit.plan.targets import spelt_out
from lorakit.run.recipe import Recipe, load_recipe

COMBINATIONS: tuple[tuple[str, ...], ...] = (
    ("q",),
    ("k",),
    ("v",),
    ("o",),
    ("q", "k"),
    ("q", "v"),
    ("q", "k", "v", "o"),
    ("gate", "up", "down"),
    ("q", "k", "v", "o", "gate", "up", "down"),
)
"""The paper's Table 5, and the feed-forward matrices, which it leaves to future work."""
STEPS = 200
EXAMPLES = 2000
Sweep = Callable[..., Any]


@dataclass(frozen=True)
class Candidate:
    """targets: short names (see lorakit.plan.targets); rank: the largest within the budget; parameters: that it trains, without a
    head; changes: to the recipe (key -> value)."""

    targets: tuple[str, ...]
    rank: int
    parameters: int
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One candidate as measured. loss: on the eval set; metrics: the task's. spread: of the score over the seeds."""

    candidate: Candidate
    score: float
    spread: float
    loss: float | None


@dataclass(frozen=True)
class BudgetAdvice:
    """budget: parameters; score: the metric's name ("loss" of the eval set); rows: best first; folder: the sweep's; left_out:
    combinations that the model has not, or that are over the budget at rank 1; failed: whose training broke off."""

    budget: int
    score: str
    rows: tuple[Measured, ...]
    folder: Path
    left_out: tuple[str, ...]
    failed: tuple[str, ...]

    def yaml(self) -> str:
        """Lines for the recipe's `method:`, of the best."""
        import yaml

        best = self.rows[0].candidate
        return yaml.safe_dump(
            {"method": {key.partition(".")[2]: value for key, value in best.changes.items()}}, sort_keys=False
        )

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {**vars(one), "candidate": {**vars(one.candidate), "changes": dict(one.candidate.changes)}}
            for one in self.rows
        ]
        return {
            "budget": self.budget,
            "score": self.score,
            "rows": rows,
            "folder": str(self.folder),
            "left_out": list(self.left_out),
            "failed": list(self.failed),
            "yaml": self.yaml(),
        }


def advise_budget(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    budget: int,
    *,
    sweep: Sweep,
    output: str | Path,
    combinations: Sequence[Sequence[str]] = COMBINATIONS,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    examples: int | None = EXAMPLES,
    overrides: Sequence[str] = (),
    **how: Any,
) -> BudgetAdvice:
    """Train every combination of matrices at the rank that `budget` parameters allow, and tell which did best.

    sweep: lorakit.sweep.api.sweep, to which `how` goes (at_once, listener, overwrite). output: its folder; what is finished there
    is not trained again. steps, examples: of each candidate's training, the recipe's where those are fewer. alpha stays the
    recipe's, as in the paper. Raises UsageError where there is no data.eval to judge by, where the method is no LoRA, where the
    budget is under every combination; else as `sweep`.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError(f"budget must be a whole number of parameters of at least 1, not {budget!r}.")
    resolved = _short(load_recipe(recipe, overrides), steps, examples)
    candidates, left_out = find_candidates(resolved, budget, combinations)
    found = sweep(resolved, variants=[one.changes for one in candidates], seeds=list(seeds), output=output, **how)
    return _judged(found, candidates, budget, left_out)


def _short(recipe: Recipe, steps: int, examples: int | None) -> Recipe:
    data, train = recipe.data, recipe.train
    if data.eval is None:
        raise UsageError(
            "advice on a budget is a measurement, and the recipe has no data.eval to measure on. Name one."
        )
    if not isinstance(recipe.method, LoRA):
        raise UsageError("advice on a budget chooses matrices and ranks for `method: {name: lora}`.")
    most = min(steps, train.max_steps or steps)
    limit = data.limit if examples is None else min(examples, data.limit or examples)
    return replace(recipe, train=replace(train, max_steps=most), data=replace(data, limit=limit))


def find_candidates(
    recipe: Recipe, budget: int, combinations: Sequence[Sequence[str]]
) -> tuple[list[Candidate], list[str]]:
    """What fits the budget, and what was left out and why. The model is built on the meta device; no weight is read."""
    model = find(recipe.model, recipe.task).build(torch.float32)
    candidates, left_out = list[Candidate](), list[str]()
    for names in combinations:
        found = _methods(recipe.method, model, names)  # type: ignore[arg-type]
        label = "+".join(names)
        if found is None:
            left_out.append(f"{label}: the model has not all of these matrices")
            continue
        method, fixed, cost, widest = found
        rank = min(max(0, budget - fixed) // cost, widest)
        if not rank:
            left_out.append(f"{label}: rank 1 takes {fixed + cost:,} parameters")
            continue
        changes: dict[str, Any] = {"method.target_modules": list(method.target_modules), "method.r": rank}
        if method.enable_lora or recipe.method.enable_lora:  # type: ignore[attr-defined]
            changes["method.enable_lora"] = {key: list(value) for key, value in method.enable_lora.items()}
        if recipe.method.rank_pattern:  # type: ignore[attr-defined]  # each candidate has one rank throughout
            changes["method.rank_pattern"] = {}
        if all(one.changes != changes for one in candidates):
            candidates.append(Candidate(tuple(_present(names, model)), rank, fixed + cost * rank, changes))
    if not candidates:
        raise UsageError(f"no combination fits {budget:,} parameters: {'; '.join(left_out)}.")
    return candidates, left_out


def _present(names: Sequence[str], model: nn.Module) -> list[str]:
    """`names` without a gate where the model has none: half the families do without."""
    return [name for name in names if name != "gate" or _spelt(LoRA(target_modules=[name]), model) is not None]


def _methods(base: LoRA, model: nn.Module, names: Sequence[str]) -> tuple[LoRA, int, int, int] | None:
    """(the method at rank 1, what it trains at any rank, what each rank adds, the highest rank that makes sense).

    None where the model lacks the matrices.
    """
    plain = replace(
        base, r=1, target_modules=_present(names, model), enable_lora={}, rank_pattern={}, modules_to_save=None
    )
    method = _spelt(plain, model)
    if method is None:
        return None
    draft = method.draft(model, dtype=None, generator=None)
    tensors = [pair for _, pair in draft.all_pairs()]
    cost = sum(one.A.numel() + one.Bt.numel() for one in tensors)
    fixed = sum(tensor.numel() for tensor in draft.tensors()) - cost  # magnitudes, biases, heads, rows of tokens
    return method, fixed, cost, min(min(one.A.shape[-1], one.Bt.shape[-1]) for one in tensors)


def _spelt(method: LoRA, model: nn.Module) -> LoRA | None:
    try:
        return spelt_out(method, model)
    except TargetError:
        return None


def _judged(found: Any, candidates: Sequence[Candidate], budget: int, left_out: Sequence[str]) -> BudgetAdvice:
    metric = next((name for one in found.members for name in one.after), None)
    sign = -1 if metric is not None and METRICS[metric].higher_is_better else 1
    rows, failed = [], []
    for candidate in candidates:
        own = [
            one
            for one in found.members
            if {key: one.changes.get(key) for key in candidate.changes} == candidate.changes
        ]
        scores = [one.eval_loss if metric is None else one.after.get(metric) for one in own]
        if any(score is None for score in scores):
            failed.append("+".join(candidate.targets))
            continue
        mean = sum(scores) / len(scores)
        losses = [one.eval_loss for one in own if one.eval_loss is not None]
        rows.append(Measured(candidate, mean, max(scores) - min(scores), sum(losses) / len(losses) if losses else None))
    if not rows:
        raise UsageError(f"every candidate's training broke off: see {found.folder}. Try a lower train.lr.")
    rows.sort(key=lambda one: sign * one.score)
    return BudgetAdvice(budget, metric or "loss", tuple(rows), found.folder, tuple(left_out), tuple(failed))
