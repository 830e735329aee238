"""One run of a sweep: as `lorakit train`'s, on a model and data that it shares with others."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorakit.attach.api import attach, detach, learning_rates, parameters, use
from lorakit.evaluate import METRICS
from lorakit.run.batches import as_if_packed, parts_of
from lorakit.run.begin import begin_from
from lorakit.run.listen import Listener
from lorakit.run.recipe import Recipe, to_mapping, to_yaml
from lorakit.run.train import Run
from lorakit.sweep.joint import MemberTrainer
from lorakit.train.loop import Hooks
from lorakit.train.prune import pruned_objective


class Member(Run):
    """name: of its adapter on the shared model, and of its folder."""

    def __init__(self, recipe: Recipe, name: str, listener: Listener) -> None:
        super().__init__(recipe, None, listener)
        self.name = name

    def reading(self) -> str:
        """What its data sets follow from: members of one key have the same."""
        document = to_mapping(self.recipe)
        data = document["data"]
        drawn = data["limit"] is not None or data["eval_limit"] is not None
        return json.dumps([self.recipe.task, data, self.recipe.train.seed if drawn else None], sort_keys=True)

    def measuring(self) -> str:
        """What its measurement of the base follows from."""
        document = to_mapping(self.recipe)
        return json.dumps([self.reading(), document["generate"], document["evaluate"]], sort_keys=True)

    def borrow(self, other: "Member") -> None:
        """Take over the data sets of a member that reads the same."""
        self.train_set, self.eval_set, self.test_set = other.train_set, other.eval_set, other.test_set

    def adapt(self) -> None:
        """Nothing yet: `dress` attaches, once the model is known to be everyone's."""

    def dress(self, model: nn.Module) -> None:
        """Attach this member's adapter to the shared model, drawn as a run of its own would."""
        self.model: Any = model
        attach(model, self.method(), name=self.name, dtype=torch.float32, seed=self.recipe.train.seed)
        if self.recipe.start_from is not None:
            begin_from(model, self.recipe.start_from, self.name)

    def undress(self) -> None:
        detach(self.model, self.name)

    def trainer(self) -> MemberTrainer:
        settings = self.settings
        self.objective = self.task_objective(settings.label_smoothing)
        plain = self.task_objective()
        self.measured = pruned_objective(plain, self.model) if settings.prune_last_block else plain
        hooks = Hooks(
            row=self.told,
            evaluate=self.evaluate if self.eval_rows else None,
            higher_is_better=lambda name: name in METRICS and METRICS[name].higher_is_better,
        )
        trained, rates = parameters(self.model, self.name), learning_rates(self.model, self.name)
        batches = self.batches(self.train_rows)
        as_if_packed(self.recipe, self.loaded, batches)
        parts = parts_of(self.recipe, own_loss=False)
        return MemberTrainer(self.model, trained, batches, self.objective, settings, hooks, rates, parts)

    def told(self, row: Mapping[str, float]) -> None:
        """A row of its metrics; the listener hears of the pass as a whole."""
        self.folder.add_row(row)
        self.trackers.row(row)

    def begin(self) -> None:
        """Open the folder. What an unfinished sweep left in it is replaced."""
        self.folder.begin(to_yaml(self.recipe), self.start())

    def evaluate(self) -> dict[str, float]:
        with use(self.model, self.name):
            return super().evaluate()

    def finish(self, trainer: MemberTrainer, failed: str | None) -> None:
        """Save the adapter, measure it, and write summary and report. failed: what ended its training early."""
        self.trackers.finish()
        with use(self.model, self.name):
            self.save_adapter()
            if failed is not None:
                self.folder.write_summary({"failed": failed, "steps": trainer.state.step})
                return
            self.summarise(trainer)
