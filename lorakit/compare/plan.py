"""A comparison's recipe: an ordinary one and a section `compare`, resolved into a recipe for each run."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.compare.arms import Arm, arms_of
from lorakit.compare.config import CompareConfig
from lorakit.errors import RecipeError
from lorakit.evaluate import METRICS, check_metrics
from lorakit.run.check import check_recipe
from lorakit.run.recipe import CLASSIFIERS, Recipe, build, load_recipe, override_key, read_document
from lorakit.run.train import Run, kind_of

SECTION = "compare"


@dataclass(frozen=True)
class Plan:
    """document: the ordinary part, as the user wrote it; recipe: the same, resolved, with the first arm's method."""

    document: dict[str, Any]
    recipe: Recipe
    config: CompareConfig
    arms: list[Arm]

    def recipe_of(
        self, arm: Arm, *, lr: float, seed: int, output: Path, quality: str | None = None, judge: bool = False
    ) -> Recipe:
        """The recipe of one run. quality: what the best epoch of a classifier is chosen by. judge: a run of the search."""
        document = _with_method(self.document, arm)
        document["output"] = str(output)
        train = document["train"] = {**document.get("train", {}), "lr": lr, "seed": seed}
        if self.recipe.task in CLASSIFIERS and quality is not None:
            train.setdefault("best_metric", quality)
        own = document.get("evaluate", {})
        document["evaluate"] = {**own, "samples": 0, "before": False}
        if judge:
            document["data"] = {key: value for key, value in document["data"].items() if key != "test"}
            if self.recipe.task not in CLASSIFIERS:
                document["evaluate"].pop("metrics", None)
        return load_recipe(document)


def _with_method(document: Mapping[str, Any], arm: Arm) -> dict[str, Any]:
    return {**copy.deepcopy(dict(document)), "method": copy.deepcopy(arm.document)}


def load_plan(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file or a mapping. overrides: "compare.seeds=[0]" or "train.epochs=1" each.

    Raises RecipeError, with every fault of the section `compare`, or of the methods, at once.
    """
    document = read_document(source) if isinstance(source, str | Path) else copy.deepcopy(dict(source))
    for override in overrides:
        override_key(document, override)
    if SECTION not in document:
        raise RecipeError(
            "there is no section `compare`: expected `compare: {methods: [lora, ...]}` beside the recipe's."
        )
    if "method" in document:
        raise RecipeError("a comparison names its methods under compare.methods. Leave `method` out.")
    section = document.pop(SECTION)
    faults: list[str] = []
    config = build(CompareConfig, section, SECTION, faults)
    if faults:
        raise RecipeError("the comparison has faults:\n" + "\n".join(f"  - {fault}" for fault in faults))
    arms = arms_of(config.methods)
    recipe = load_recipe(document)  # what is wrong with the ordinary part is told once, not for every method
    _check(recipe, config)
    plan = Plan(document, recipe, config, arms)
    _check_arms(plan)
    return plan


def _check(recipe: Recipe, config: CompareConfig) -> None:
    check_recipe(recipe, own_loss=False)
    classifies = recipe.task in CLASSIFIERS
    if kind_of(recipe.task) is not Run:
        raise RecipeError(f"{recipe.task} is not compared. Train the methods one by one (lorakit train).")
    if recipe.data.eval is None:
        raise RecipeError(
            "data.eval is missing: a comparison measures on it (or on data.test, and keeps the best on it)."
        )
    if recipe.train.save_every is not None:
        raise RecipeError("train.save_every: the runs of a comparison keep no checkpoints. Leave it out.")
    if config.quality not in (None, "loss"):
        check_metrics((config.quality,), None if classifies else "text")
    if classifies and config.quality in METRICS and METRICS[config.quality].kind == "text":
        raise RecipeError(f"compare.quality: {config.quality} compares texts, not labels.")
    if config.few_shot and recipe.task != "causal-lm":
        raise RecipeError(f"compare.few_shot belongs to causal-lm, not to {recipe.task}.")
    if config.general.text is not None and recipe.task != "causal-lm":
        raise RecipeError(f"compare.general.text is read by causal-lm, not by {recipe.task}.")
    if (
        config.quality not in (None, "loss")
        and not classifies
        and config.quality not in (recipe.evaluate.metrics or ())
    ):
        raise RecipeError(f"compare.quality is {config.quality!r}: name it among evaluate.metrics.")


def _check_arms(plan: Plan) -> None:
    """Every method's fields, before anything loads."""
    faults: list[str] = []
    for arm in plan.arms:
        try:
            check_recipe(load_recipe(_with_method(plan.document, arm)), own_loss=False)
        except RecipeError as error:
            lines = [line.removeprefix("  - ") for line in str(error).splitlines()]
            faults += [f"{arm.label}: {line}" for line in (lines[1:] if len(lines) > 1 else lines)]
    if faults:
        raise RecipeError("the methods have faults:\n" + "\n".join(f"  - {fault}" for fault in faults))


def better(quality: str) -> int:
    """1 where more of a metric is better, else -1."""
    return 1 if quality in METRICS and METRICS[quality].higher_is_better else -1
