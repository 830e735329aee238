"""One run of a comparison: as `lorakit train`'s, on the base and the data that all share."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.attach.anatomy import output_head
from lorakit.attach.api import attach
from lorakit.attach.host import host_of
from lorakit.compare.shared import Base
from lorakit.data import Dataset
from lorakit.methods.kept import kept_of
from lorakit.models import Loaded
from lorakit.run.listen import Listener
from lorakit.run.recipe import Recipe
from lorakit.run.subject import NAME
from lorakit.run.train import Run
from lorakit.train.loop import Trainer


@dataclass(frozen=True)
class Sets:
    """The data sets of a run."""

    train: Dataset
    eval: Dataset
    test: Dataset | None


class Child(Run):
    """quality: the metric wanted, "loss" for the eval loss. judge: a run of the search, measured on the rows set aside and not
    kept; of text it is judged by its loss, for decoding would take longer than training.
    """

    def __init__(
        self, recipe: Recipe, base: Base, sets: Sets | None, quality: str, listener: Listener, *, judge: bool = False
    ) -> None:
        super().__init__(recipe, None, listener)
        self.base, self.sets, self.quality, self.judge = base, sets, quality, judge

    def read_data(self) -> None:
        if self.sets is None:
            super().read_data()
        else:
            self.train_set, self.eval_set, self.test_set = self.sets.train, self.sets.eval, self.sets.test

    def load_model(self) -> None:
        self.open()
        self.dress()

    def open(self) -> Loaded:
        """The shared base, with the fresh head of this run's seed."""

        def load() -> Loaded:
            Run.load_model(self)
            return self.loaded

        self.loaded = self.base.at(self.recipe.train.seed, load)
        self.model = self.loaded.model
        return self.loaded

    def adapt(self) -> None:
        """Nothing while the base is loaded: it is everyone's."""

    def dress(self) -> None:
        """Attach the method."""
        super().adapt()

    def trainer(self) -> Trainer:
        made = super().trainer()
        made.hooks.checkpoint = None  # a run is short, and an optimizer's state is twice the model for full fine-tuning
        return made

    def measure_base(self) -> None:
        """Nothing: the comparison measures the base once for all."""

    @property
    def wanted(self) -> str:
        """The metric that this run is judged by."""
        return "loss" if self.judge and not self.classifies else self.quality

    def measure_adapter(self) -> dict[str, float]:
        found = {} if self.judge and not self.classifies else super().measure_adapter()
        return {**found, "loss": self.evaluate()["loss"]} if self.wanted == "loss" else found

    def trained(self) -> int:
        """Numbers that the method trains; of a classifier without the head, as the paper counts."""
        record = host_of(self.model).records[NAME]
        head = output_head(self.model) if self.trains_head else None
        own = set(map(id, kept_of(record.draft, head)))
        return sum(tensor.numel() for tensor in record.tensors() if id(tensor) not in own)

    def positions(self) -> int | None:
        """The positions of the sequence that prompts and prefixes take; None where there are none."""
        taken: dict[type, int] = {}  # of layers that each take some, the most: their keys lie side by side
        for group in host_of(self.model).records[NAME].draft.inserts.values():
            for insert in group.values():
                kind = type(insert.operation)
                taken[kind] = max(taken.get(kind, 0), insert.operation.positions)
        return sum(taken.values()) or None

    def adapter_bytes(self) -> int:
        """The size of the adapter's tensor files, a trained head included."""
        return sum(file.stat().st_size for file in self.folder.adapter.rglob("*.safetensors"))

    def drop_adapter(self) -> None:
        shutil.rmtree(self.folder.adapter, ignore_errors=True)

    def value(self, summary: Mapping[str, Any]) -> float:
        """What the run is judged by."""
        return float(summary["after"][self.wanted])


def attach_for_measuring(child: Child) -> None:
    """Attach the child's method afresh and frozen: latency does not depend on what was learnt."""
    child.open()
    attach(child.model, child.method(), name=NAME, trainable=False, dtype=torch.float32, seed=child.recipe.train.seed)
