"""The runs of a comparison, in an order in which an early stop leaves something of every method: the base, the searches, then
seed by seed; then memory and latency. What its folder holds already is not made again.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.compare.arms import Arm
from lorakit.compare.baselines import base_outcome, majority_outcome
from lorakit.compare.child import Child, Sets
from lorakit.compare.general import general_perplexity, general_rows
from lorakit.compare.latency import added_latency
from lorakit.compare.memory import peak_of
from lorakit.compare.outcome import DONE, FAILED, Kept, Outcome, key_of, told
from lorakit.compare.plan import Plan, better
from lorakit.compare.result import BASE, METHOD, Row
from lorakit.compare.search import best_rate, next_rate
from lorakit.compare.shared import Base, hold_out, own_parameters
from lorakit.data import Encoded
from lorakit.errors import RecipeError, TrainingError
from lorakit.run.listen import Listener
from lorakit.run.recipe import CLASSIFIERS, Recipe, to_mapping
from lorakit.run.stamp import sources_of, stamp

RUNS = "runs"


@dataclass(frozen=True)
class Choice:
    """What a search ended with. lr: None where no rate worked; tried: rate -> what it gave; reason: of the newest failure."""

    lr: float | None
    tried: dict[str, float | None]
    reason: str | None = None


FEW = (4,)


class Study:
    """One comparison in one folder. base: the shared model."""

    def __init__(self, plan: Plan, folder: Path, listener: Listener, *, retry: bool) -> None:
        self.plan, self.folder, self.listener = plan, folder, listener
        self.config = plan.config
        self.kept = Kept(folder / RUNS, retry=retry)
        self.base = Base()
        self.stamps = stamp(sources_of(plan.recipe))
        self.text_stamp = stamp([self.config.general.text])
        self._general: list[Encoded] | None = None
        reader = self._child(plan.recipe, None, "loss")
        reader.read_data()  # with the recipe's own seed: all runs see the same rows
        self.sets = Sets(reader.train_set, reader.eval_set, reader.test_set)
        self.metrics = list(reader._metrics(reader.train_set)) if self.classifies else []
        self.quality = self.config.quality or self._first_metric()
        if self.classifies and self.quality not in ("loss", *self.metrics):
            raise RecipeError(
                f"compare.quality is {self.quality!r}, but what is measured is {', '.join(self.metrics)}."
            )
        self.sign = better(self.quality)
        train, aside = hold_out(self.sets.train, self.config.search.holdout, self.config.search.seed)
        self.search_sets = Sets(train, aside, None)

    @property
    def classifies(self) -> bool:
        return self.plan.recipe.task in CLASSIFIERS

    def _first_metric(self) -> str:
        if self.classifies:
            return self.metrics[0]
        return (self.plan.recipe.evaluate.metrics or ("loss",))[0]

    def _child(self, recipe: Recipe, sets: Sets | None, quality: str, *, judge: bool = False) -> Child:
        return Child(recipe, self.base, sets, quality, Quiet(self.listener), judge=judge)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Every row of the table."""
        rows = self._base_rows()
        chosen = [self._search(arm) for arm in self.plan.arms]
        outcomes: dict[str, list[Outcome]] = {arm.label: [] for arm in self.plan.arms}
        for seed in self.config.seeds:
            for arm, choice in zip(self.plan.arms, chosen, strict=True):
                outcomes[arm.label].append(self._final(arm, choice, seed))
        for arm, choice in zip(self.plan.arms, chosen, strict=True):
            row = Row(arm.label, METHOD, arm.family, arm.size, arm.swept, choice.lr, choice.tried, outcomes[arm.label])
            rows.append(self._measured(row, arm) if row.done else row)
        return rows

    def _base_rows(self) -> list[Row]:
        if self.classifies:
            named = self.sets.train.label_names is not None and self.config.majority and self.quality != "loss"
            return [self._majority()] if named else []
        zero = self._base_row("base, zero-shot", 0, (self.plan.recipe.train.seed,))
        before = self.about_base()["perplexity"]
        rows = [replace(zero, runs=[replace(run, perplexity=before) for run in zero.runs])]
        few = self.config.few_shot or (FEW if self.plan.recipe.task == "causal-lm" else ())
        return rows + [self._base_row(f"base, {count}-shot", count, self.config.seeds) for count in few]

    def _majority(self) -> Row:
        label = "most frequent class"
        measured = self.sets.test or self.sets.eval
        run = self._attempt(label, lambda: majority_outcome(self.sets.train, measured, self.metrics, self.quality))
        return Row(label, BASE, label, runs=[run])

    def _base_row(self, label: str, shots: int, seeds: tuple[int, ...]) -> Row:
        recipe = self.plan.recipe
        document = {**to_mapping(recipe), "method": None, "output": None, "train": None}
        runs = []
        for seed in seeds:
            key = key_of(label, document, self.stamps, self.quality, shots, seed, recipe.train.seed)

            def make(seed: int = seed) -> Outcome:
                child = self._child(recipe, self.sets, self.quality)
                return self._attempt(label, lambda: base_outcome(child, shots, seed), seed=seed)

            runs.append(self.kept.outcome(f"base-{shots}-shot/seed-{seed}", key, make))
        return Row(label, BASE, label, runs=runs)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _search(self, arm: Arm) -> Choice:
        """The learning rate to train with. A method that fails for another reason than its rate is not tried again."""
        budget, tried, reason = self.config.search.budget, dict[float, float | None](), None
        if len(arm.rates) == 1 or budget == 1:
            return Choice(arm.rates[len(arm.rates) // 2], {})
        signed: dict[float, float | None] = {}
        while (rate := next_rate(arm.rates, signed, budget)) is not None:
            outcome = self._run(arm, rate, self.config.search.seed, judge=True)
            tried[rate] = outcome.quality
            sign = self.sign if self.classifies else -1  # text is judged by its loss
            signed[rate] = None if outcome.quality is None else sign * outcome.quality
            reason = outcome.reason or reason
            if outcome.status == FAILED and not outcome.diverged:
                break
        told = {f"{rate:g}": value for rate, value in sorted(tried.items())}
        return Choice(best_rate(signed), told, reason)

    def _final(self, arm: Arm, choice: "Choice", seed: int) -> Outcome:
        if choice.lr is None:
            return Outcome(seed, status=FAILED, reason=f"no learning rate that was tried worked: {choice.reason}")
        return self._run(arm, choice.lr, seed, judge=False)

    def _run(self, arm: Arm, lr: float, seed: int, *, judge: bool) -> Outcome:
        place = f"{arm.folder}/{'search-' if judge else ''}lr-{lr:g}-seed-{seed}"
        recipe = self.plan.recipe_of(
            arm, lr=lr, seed=seed, output=self.kept.root / place, quality=self.quality, judge=judge
        )
        about = f"{arm.label}, learning rate {lr:g}, seed {seed}{' (search)' if judge else ''}"
        facts = [{**to_mapping(recipe), "output": None}, self.stamps, self.quality, self.plan.recipe.train.seed]
        facts += (
            [self.config.search.holdout, self.config.search.seed] if judge else [self.text_stamp, self.config.general]
        )

        def make() -> Outcome:
            sets = self.search_sets if judge else self.sets
            child = self._child(recipe, sets, self.quality, judge=judge)
            return self._attempt(about, lambda: self._train(child, lr, seed), seed=seed, lr=lr)

        return self.kept.outcome(place, key_of(judge, *facts), make)

    def _train(self, child: Child, lr: float, seed: int) -> Outcome:
        result = child.go(resume=False, overwrite=True)
        if result.interrupted:
            raise KeyboardInterrupt
        summary = result.summary
        outcome = Outcome(
            seed,
            lr,
            quality=child.value(summary),
            metrics=dict(summary["after"]),
            trained=child.trained(),
            steps=summary["steps"],
            best_step=summary["best_step"],
            step_seconds=summary["training_seconds"] / max(1, summary["steps"]),
            adapter_bytes=child.adapter_bytes(),
            positions=child.positions(),
            perplexity=None if child.judge else general_perplexity(child.model, self.general(child)),
            seconds=summary["seconds"],
        )
        if child.judge:
            child.drop_adapter()
        return outcome

    def _attempt(self, about: str, make: Callable[[], Outcome], *, seed: int = 0, lr: float | None = None) -> Outcome:
        """`make`'s outcome, or the failure of it: one method's trouble is not the others'."""
        self.listener.stage(about)
        try:
            outcome = make()
        except Exception as error:
            outcome = Outcome(seed, lr, FAILED, told(error), diverged=isinstance(error, TrainingError))
        try:
            self.base.clear()
        except TrainingError as error:
            outcome = Outcome(seed, lr, FAILED, outcome.reason or told(error))
        if outcome.status == DONE and outcome.quality is not None:
            self.listener.note(f"{self.quality if self.classifies else 'result'}: {outcome.quality:.4g}")
        elif outcome.reason:
            self.listener.note(f"failed: {outcome.reason}")
        return outcome

    # -- figures -------------------------------------------------------------------------------------------------------

    def general(self, child: Child) -> list[Encoded]:
        """The general text's windows."""
        if self._general is None:
            self._general = general_rows(self.config.general, child.loaded)
        return self._general

    def _measured(self, row: Row, arm: Arm) -> Row:
        """The row with its memory and latency."""
        recipe = self.plan.recipe_of(
            arm, lr=arm.rates[0], seed=self.config.seeds[0], output=self.kept.root / arm.folder / "measure",
            quality=self.quality,
        )  # fmt: skip
        key: list[Any] = [{**to_mapping(recipe), "output": None}, self.stamps]
        notes = []
        memory, why = None, None
        if self.config.memory:
            memory, why = self._figure(f"{arm.folder}/memory", key, f"the memory of {arm.label}",
                                       lambda: peak_of(recipe, self.quality))  # fmt: skip
            notes += [f"its memory was not measured: {why}"] if why else []
        child = self._child(recipe, self.sets, self.quality)

        def timed() -> list[dict[str, Any]]:
            child.read_data()
            return [one.as_dict() for one in added_latency(child, self.config.latency, self.listener.progress)]

        key = [*key, self.config.latency]
        latency, why = self._figure(f"{arm.folder}/latency", key, f"the latency of {arm.label}", timed)
        notes += [f"its latency was not measured: {why}"] if why else []
        return replace(row, peak_memory=memory, latency=latency or (), notes=notes)

    def _figure(self, place: str, facts: list[Any], about: str, make: Callable[[], Any]) -> tuple[Any, str | None]:
        """(the figure kept at `place` or made now, why there is none)."""
        key = key_of(*facts)
        found = self.kept.read(place, key)
        if found is None:
            self.listener.stage(about)
            try:
                found = make()
            except Exception as error:  # the comparison goes on without this figure
                self.base.drop()
                return None, told(error)
            with suppress(TrainingError):  # the base is dropped, and loaded anew for what comes next
                self.base.clear()
            self.kept.write(place, key, found)
        return found, None

    def opened(self) -> Child:
        """A child on the bare base."""
        child = self._child(self.plan.recipe, self.sets, self.quality)
        child.read_data()
        child.open()
        return child

    def about_base(self) -> dict[str, Any]:
        """The base's size, and its perplexity on the general text."""
        recipe = self.plan.recipe
        key = key_of(recipe.model, recipe.base, self.text_stamp, self.config.general, recipe.task, self.stamps)
        found = self.kept.read("base", key)
        if found is None:
            child = self.opened()
            rows = self.general(child)
            if rows:
                self.listener.stage("the base on the general text")
            found = {"parameters": own_parameters(child.model), "perplexity": general_perplexity(child.model, rows)}
            self.kept.write("base", key, found)
        return dict(found)


class Quiet(Listener):
    """Passes on bars and rows: the stages of the single runs would bury the study's own."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def progress(self, done: int, total: int) -> None:
        self.listener.progress(done, total)

    def row(self, row: Any, total_steps: int) -> None:
        if not any(key.startswith("eval_") for key in row):
            self.listener.row(row, total_steps)
