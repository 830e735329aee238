"""The paper's rank study (Hu et al. 2021, section 7) on a small model: Tables 5, 6 and 7, Figures 3 and 4.

    python bench/rank_study.py --study e2e [--examples 4000] [--steps 400]

Every adapter is trained by one `lorakit.sweep`, several in a pass; what is finished in --out is not trained again, so that a
study that was cut off goes on. e2e: SmolLM2-135M on E2E NLG, judged by the loss on its validation set; sst2: MiniLM on SST-2,
by accuracy.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import DATA, ROOT, finish, table

from lorakit.advise.budget import find_candidates
from lorakit.analyze.api import analyze
from lorakit.analyze.result import Analysis
from lorakit.cli.show import Terminal
from lorakit.errors import UsageError
from lorakit.methods.lora import LoRA
from lorakit.plan.source import find
from lorakit.plan.targets import spelt_out
from lorakit.run.recipe import Recipe, load_recipe
from lorakit.sweep.api import sweep
from lorakit.sweep.members import name_of
from lorakit.sweep.result import MemberResult, SweepResult

Changes = dict[str, Any]
TYPES = (("q",), ("k",), ("v",), ("o",), ("q", "k"), ("q", "v"), ("q", "k", "v", "o"))  # Table 5
RANKED = (("q",), ("q", "v"), ("q", "k", "v", "o"))  # Table 6
BUDGET_RANK = 8  # Table 5's budget: what this rank of the query alone takes
STUDIES: dict[str, dict[str, Any]] = {
    "e2e": {
        "model": "smollm2-135m-instruct",
        "task": "causal-lm",
        "data": {"train": str(DATA / "e2e" / "train.txt"), "eval": str(DATA / "e2e" / "valid.txt"), "format": "e2e"},
        "train": {"batch_size": 8, "lr": 2e-4, "weight_decay": 0.01},
    },
    "sst2": {
        "model": "minilm-l6",
        "task": "sequence-classification",
        "data": {
            "train": str(DATA / "glue" / "SST-2" / "train.tsv"),
            "eval": str(DATA / "glue" / "SST-2" / "dev.tsv"),
            "max_length": 128,
            "truncate": True,
        },
        "train": {"batch_size": 16, "lr": 1e-3},
    },
}


def recipe_of(ask: argparse.Namespace) -> Recipe:
    """The study's recipe, cut to what was asked for."""
    document = {**STUDIES[ask.study], "method": {"name": "lora", "alpha": ask.alpha}, "evaluate": {"samples": 0}}
    given = {
        "model": ask.model,
        "data.limit": ask.examples,
        "data.eval_limit": ask.eval_examples,
        "train.max_steps": ask.steps,
        "train.epochs": ask.epochs,
        "train.lr": ask.lr,
    }
    return load_recipe(document, [f"{key}={value}" for key, value in given.items() if value is not None])


def changes_of(recipe: Recipe, model: Any, types: Sequence[str], rank: int) -> Changes:
    """What makes the recipe one of these matrices and this rank."""
    method = spelt_out(LoRA(target_modules=list(types)), model)
    changes: Changes = {"method.target_modules": list(method.target_modules), "method.r": rank}
    if method.enable_lora:  # q, k and v in one matrix
        changes["method.enable_lora"] = {key: list(value) for key, value in method.enable_lora.items()}
    return changes


def wanted(recipe: Recipe, ranks: Sequence[int]) -> tuple[list[tuple[str, Changes]], dict[tuple[str, int], Changes]]:
    """(Table 5's columns, Table 6's cells)."""
    model = find(recipe.model, recipe.task).build(torch.float32)
    one = find_candidates(recipe, 2**40, [("q",)])[0][0]
    budget = one.parameters // one.rank * BUDGET_RANK
    candidates, left_out = find_candidates(recipe, budget, TYPES)
    for text in left_out:
        print(f"left out of Table 5: {text}")
    fifth = [("+".join(one.targets), dict(one.changes)) for one in candidates]
    sixth = {("+".join(types), rank): changes_of(recipe, model, types, rank) for types in RANKED for rank in ranks}
    return fifth, sixth


class Study:
    """The trained members, by what they change."""

    def __init__(self, found: SweepResult, seeds: Sequence[int]) -> None:
        self.found, self.seeds = found, seeds
        self.metric = next((name for one in found.members for name in one.after), None)

    def member(self, changes: Changes, seed: int) -> MemberResult:
        return next(one for one in self.found.members if one.changes == {**changes, "train.seed": seed})

    def score(self, changes: Changes) -> str:
        """Mean and spread of the score over the seeds."""
        own = [self.member(changes, seed) for seed in self.seeds]
        scores = [one.eval_loss if self.metric is None else one.after.get(self.metric) for one in own]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return "failed"
        return f"{statistics.mean(known):.4f} ± {(max(known) - min(known)) / 2:.4f}"

    def parameters(self, changes: Changes) -> str:
        count = self.member(changes, self.seeds[0]).low_rank
        return "-" if count is None else f"{count:,}"


def table_5(study: Study, columns: Sequence[tuple[str, Changes]]) -> str:
    rows = [
        ["rank r", *(changes["method.r"] for _, changes in columns)],
        ["parameters", *(study.parameters(changes) for _, changes in columns)],
        [study.metric or "eval loss", *(study.score(changes) for _, changes in columns)],
    ]
    return table(["Weight type", *(name for name, _ in columns)], rows)


def table_6(study: Study, cells: dict[tuple[str, int], Changes], ranks: Sequence[int]) -> str:
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(study.score(cells[name, rank]) for rank in ranks)] for name in names]
    return table([f"Weight type ({study.metric or 'eval loss'})", *(f"r = {rank}" for rank in ranks)], rows)


def table_7(analyses: dict[int, Analysis]) -> str:
    """The query of the middle layer, as the paper takes layer 48 of 96."""
    rows = []
    for rank, found in analyses.items():
        known = [one for one in found.modules if one.against_base is not None]
        first = [one for one in known if one.kind == known[0].kind]
        one = first[len(first) // 2]
        base = one.against_base
        if base is not None:
            rows.append([one.path, rank, base.projected, base.own, base.random, base.weight, one.norm, base.factor])
    columns = ["matrix", "r", "‖UᵀWV‖ of ΔW", "of W", "of random", "‖W‖", "‖ΔW‖", "amplification"]
    return table(columns, rows)


def adapter(study: Study, changes: Changes, seed: int) -> str:
    one = study.member(changes, seed)
    if one.failed:
        raise UsageError(f"{one.name} failed ({one.failed}), so its pictures cannot be drawn.")
    return str(Path(one.folder) / "adapter")


def pictures(study: Study, cells: dict[tuple[str, int], Changes], ask: argparse.Namespace, model: str) -> str:
    """Figures 3 (two ranks) and 4 (two seeds) as analyses of their own, and Table 7."""
    kind, seed = "q+v", ask.seeds[0]
    high = max(ask.ranks)
    low = max((rank for rank in ask.ranks if rank <= 8 and rank < high), default=high)  # the paper's 8 against 64
    top = adapter(study, cells[kind, high], seed)
    if low != high:
        analyze(adapter(study, cells[kind, low], seed), top).save(ask.out / "figure-3", overwrite=True)
    if len(ask.seeds) > 1:
        analyze(top, adapter(study, cells[kind, high], ask.seeds[1])).save(ask.out / "figure-4", overwrite=True)
    shown = dict.fromkeys(r for r in (4 if 4 in ask.ranks else low, high))
    return table_7({r: analyze(adapter(study, cells[kind, r], seed), base=model) for r in shown})


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default="e2e")
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 4, 8, 64])
    parser.add_argument("--seeds", type=numbers, default=[0, 1])
    parser.add_argument("--alpha", type=float, default=16, help="the same for all ranks, as in the paper")
    parser.add_argument("--examples", type=int, help="training examples; default: all")
    parser.add_argument("--eval-examples", type=int, help="evaluation examples; default: all")
    parser.add_argument("--steps", type=int, help="the most steps of each adapter")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--model", help="another model for the same data")
    parser.add_argument("--at-once", type=int, default=8, help="adapters in a pass")
    parser.add_argument("--out", type=Path, help="default: runs/rank-study-STUDY")
    ask = parser.parse_args(arguments)
    ask.out = (ask.out or ROOT / "runs" / f"rank-study-{ask.study}").resolve()
    return ask


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(arguments)
    recipe = recipe_of(ask)
    fifth, sixth = wanted(recipe, ask.ranks)
    variants = {name_of(changes): changes for changes in [*(changes for _, changes in fifth), *sixth.values()]}
    with Terminal() as terminal:
        found = sweep(
            recipe,
            variants=list(variants.values()),
            seeds=ask.seeds,
            output=ask.out / "members",
            at_once=ask.at_once,
            listener=terminal,
        )
    study = Study(found, ask.seeds)
    tables = {
        "table 5": table_5(study, fifth),
        "table 6": table_6(study, sixth, ask.ranks),
        "table 7": pictures(study, sixth, ask, recipe.model),
    }
    text = "\n\n".join(f"{name.capitalize()}\n\n{one}" for name, one in tables.items())
    (ask.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(ask).items()}
    finish(f"rank_study_{ask.study}", {"settings": settings, **found.as_dict(), **tables}, text)


if __name__ == "__main__":
    main()
