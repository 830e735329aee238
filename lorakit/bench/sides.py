"""The sides that are measured: lorakit as it trains, PEFT and full fine-tuning as their users do, and two bounds.

Each takes a round's examples, makes its batches of them and trains on them (a bound goes forward and back).
"""

import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.api import detach
from lorakit.bench.config import CEILING, FLOOR, FULL, LORAKIT, PEFT, PLAIN
from lorakit.bench.material import Work, blocks_of
from lorakit.data import BatchOrder
from lorakit.errors import TrainingError
from lorakit.models import Loaded
from lorakit.models.quiet import quiet
from lorakit.run.batches import OrderedBatches, batches_of
from lorakit.run.listen import Listener
from lorakit.run.recipe import Recipe, load_recipe
from lorakit.run.subject import NAME
from lorakit.run.train import Run
from lorakit.store.api import save
from lorakit.train.loss import mean_loss, objective_for
from lorakit.train.prune import pruned_objective

Batch = Mapping[str, Tensor]
CLIP = 1.0  # transformers' Trainer's, and lorakit's default
FULL_RATE = 0.1  # full fine-tuning's learning rate over LoRA's


@dataclass(frozen=True)
class Norms:
    """Gradient norms of a step, after clipping: of how many tensors, the smallest, the largest and that of all together."""

    tensors: int
    smallest: float
    largest: float
    total: float


class Side(ABC):
    """One side of a row. steps: optimizer steps taken; loss: the newest one's training loss."""

    def __init__(self, work: Work, name: str) -> None:
        self.work, self.name = work, name
        self.steps, self.loss = 0, float("nan")

    @abstractmethod
    def round(self, numbers: Sequence[int]) -> None:
        """Train on these examples once."""

    @abstractmethod
    def checked_round(self, numbers: Sequence[int]) -> Norms:
        """The same, and the gradients' norms. Raises TrainingError where one is missing, zero or no number."""

    def final_loss(self) -> float | None:
        """The mean loss on the work's checked examples, in evaluation mode; None where the side learns nothing."""
        return None

    trainable = 0


class _Learner(Side):
    """A side with an optimizer, through whose hook the gradients are seen."""

    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]
    every_tensor = True
    """Whether each trained tensor must have a gradient (some of a whole model have none by rights: a key's bias)."""

    def checked_round(self, numbers: Sequence[int]) -> Norms:
        seen: list[list[float]] = []

        def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            seen.append([0.0 if p.grad is None else float(p.grad.norm()) for p in self.parameters])

        handle = self.optimizer.register_step_pre_hook(look)
        try:
            self.round(numbers)
        finally:
            handle.remove()
        return _norms(self.name, seen[-1], self.every_tensor)


class Lorakit(_Learner):
    """lorakit's own run: its trainer steps, on its own batches where the row leaves them to it."""

    def __init__(self, work: Work, name: str = LORAKIT) -> None:
        super().__init__(work, name)
        self.run = adapted(work, work.material.model(), name)
        self.trainer = self.run.trainer()
        self.optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        self.parameters = self.trainer.parameters
        self.trainer.model.train()
        self.trainable = sum(one.numel() for one in self.parameters)
        self._epoch, self._lengths = 0, [len(row.input_ids) for row in work.rows]

    def round(self, numbers: Sequence[int]) -> None:
        for group in self._groups(numbers):
            self.trainer.step(group)
            self.steps += 1
        self.loss = self.run.newest["loss"]

    def _groups(self, numbers: Sequence[int]) -> Iterator[list[Batch]]:
        """The batches of each optimizer step."""
        if self.work.kind.given:
            yield [self.work.padded(numbers)]
            return
        self.run.trained_on.order = _Given(self._chosen(numbers), self._lengths, self.work.material.config.batch)
        made = list(self.trainer.batches.make(self._epoch, 0))  # packed, or with kept states, as the trainer has them
        self._epoch += 1
        size = self.run.recipe.train.accumulate if self.work.kind.name == "free" else len(made)
        yield from (made[begin : begin + size] for begin in range(0, len(made), size))

    def _chosen(self, numbers: Sequence[int]) -> list[list[int]]:
        """The rows of each batch: all in one, as `lorakit train` with that batch size, or as its bound of tokens has it."""
        if self.work.kind.name != "free":
            return [list(numbers)]
        run = self.run
        order = batches_of(run.recipe, run.loaded, [self.work.rows[number] for number in numbers]).order
        return [[numbers[place] for place in batch] for batch in order.epoch(0)]

    def final_loss(self) -> float:
        self.run.model.eval()
        batches = [self.work.padded(chunk) for chunk in self.work.chunks(self.work.checked)]
        return mean_loss(self.run.model, batches, self.run.measured)


class _Given(BatchOrder):
    """An order that is told."""

    def __init__(self, batches: Sequence[Sequence[int]], lengths: Sequence[int], size: int) -> None:
        super().__init__(lengths, size, seed=0)
        self.given = [list(batch) for batch in batches]

    def __len__(self) -> int:
        return len(self.given)

    def epoch(self, epoch: int) -> list[list[int]]:
        return self.given


class _Loop(_Learner):
    """The plain training loop of transformers' and PEFT's documentation: the model's own loss, one batch a step."""

    def __init__(self, work: Work, name: str, model: Any, lr: float) -> None:
        super().__init__(work, name)
        self.model = model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)

    def round(self, numbers: Sequence[int]) -> None:
        for chunk in self.work.chunks(numbers):
            loss = self.model(**self.work.padded(chunk)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.loss, self.steps = float(loss.detach()), self.steps + 1

    @torch.no_grad()
    def final_loss(self) -> float:
        self.model.eval()
        count = objective_for(self.work.material.task).targets
        batches = [self.work.padded(chunk) for chunk in self.work.chunks(self.work.checked)]
        parts = [(float(self.model(**batch).loss), count(batch)) for batch in batches]
        return sum(loss * targets for loss, targets in parts) / max(1, sum(targets for _, targets in parts))


class Peft(_Loop):
    """PEFT with the adapter that lorakit begins with: same targets, same first values."""

    def __init__(self, work: Work) -> None:
        with _peft_quiet(), tempfile.TemporaryDirectory() as folder:
            from peft import PeftModel

            first = adapted(work, work.material.model(), LORAKIT)
            save(first.model, Path(folder), NAME)
            first.undo()
            model = PeftModel.from_pretrained(work.material.model(), folder, is_trainable=True)
        super().__init__(work, PEFT, model, work.material.config.lr)


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """PEFT warns of transformers' names to come; importing it wakes torchao, which tells of kernels that it lacks."""
    with quiet(progress=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Full(_Loop):
    """Full fine-tuning."""

    every_tensor = False

    def __init__(self, work: Work) -> None:
        model = work.material.model(own=True).requires_grad_(True)
        super().__init__(work, FULL, model, work.material.config.lr * FULL_RATE)


class Floor(Side):
    """The frozen base, forward and activation gradients only, with lorakit's loss (head on targets, last
    block pruned where that is exact): what any adapter must cost at least."""

    def __init__(self, work: Work, name: str = FLOOR) -> None:
        super().__init__(work, name)
        self.model = work.material.model().requires_grad_(False).train()
        self.objective = objective_for(work.material.task)
        if recipe_of(work, name).train.prune_last_block:
            self.objective = pruned_objective(self.objective, self.model)
        self.entry: Tensor | None = None
        self._prepare()

    def _prepare(self) -> None:
        def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.entry = output.detach().requires_grad_()
            return self.entry

        self.model.get_input_embeddings().register_forward_hook(enter)

    def round(self, numbers: Sequence[int]) -> None:
        for chunk in self.work.chunks(numbers):
            part = self.objective.loss(self.model, self.work.padded(chunk))
            torch.autograd.backward(part.total / max(1, part.targets))
            self.loss, self.steps = float(part.total.detach()) / max(1, part.targets), self.steps + 1

    def checked_round(self, numbers: Sequence[int]) -> Norms:
        self.round(numbers)
        grad = None if self.entry is None else self.entry.grad
        return _norms(self.name, [0.0 if grad is None else float(grad.norm())], every=True)


class Ceiling(Floor):
    """The floor of the adapted upper layers alone: those below them are computed once and their output is kept.

    For one batch again and again, as the row gives it.
    """

    def __init__(self, work: Work) -> None:
        self.kept: Tensor | None = None
        self.first = min(work.material.layers(work.kind) or [0])
        super().__init__(work, CEILING)

    def _prepare(self) -> None:
        blocks = blocks_of(self.model)
        blocks[self.first].register_forward_pre_hook(self._enter, with_kwargs=True)
        for block in blocks[: self.first]:
            block.forward = self._skipping(block.forward)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if self.kept is None:
            self.kept = (args[0] if args else kwargs["hidden_states"]).detach()
        self.entry = self.kept.detach().requires_grad_()
        return ((self.entry, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.entry})

    def _skipping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        known: list[Any] = []

        def skip(*args: Any, **kwargs: Any) -> Any:
            if self.kept is None or not known:
                known[:] = [forward(*args, **kwargs)]
            return known[0]

        return skip


class BenchRun(Run):
    """lorakit's run over examples that are there already; nothing is written."""

    def __init__(self, recipe: Recipe, loaded: Loaded, rows: Sequence[Any]) -> None:
        super().__init__(recipe, None, Listener())
        self.loaded, self.model = loaded, loaded.model
        self.train_rows, self.eval_rows = list(rows), None
        self.newest: Mapping[str, float] = {}
        self.adapt()

    def batches(self, rows: Sequence[Any]) -> OrderedBatches:
        self.trained_on = super().batches(rows)
        return self.trained_on

    def add_row(self, row: Mapping[str, float]) -> None:
        self.newest = row

    def undo(self) -> None:
        """Take the adapter off again."""
        detach(self.model, NAME)


def adapted(work: Work, model: Any, side: str) -> BenchRun:
    """lorakit's run of a side on `model`, its adapter attached."""
    loaded = work.material.loaded
    own = Loaded(model, loaded.tokenizer, loaded.name, loaded.source, loaded.task)
    return BenchRun(recipe_of(work, side), own, work.rows)


def recipe_of(work: Work, side: str) -> Recipe:
    """The recipe that lorakit's side runs."""
    config = work.material.config
    dropout = config.dropout if work.kind.name == "dropout" and side == LORAKIT else 0.0
    layers = work.material.layers(work.kind)
    own: dict[str, Any] = {}
    if work.kind.name == "free":
        own = {"batch_tokens": config.batch_tokens or config.batch * config.length}
    elif work.kind.upper:
        own = {"prefix_cache": True}  # one epoch's rows again and again: as if there were many
    if work.kind.given:
        own["pass_tokens"] = None  # one forward pass for the same batch, as the other sides have it
    document = {
        "model": config.model,
        "task": work.material.task,
        "data": {"train": config.data},
        "method": {"name": "lora", "r": config.r, "dropout": dropout, "layers_to_transform": layers},
        "train": {
            "batch_size": config.batch,
            "lr": config.lr,
            "schedule": "constant",
            "warmup": 0.0,
            "clip": CLIP,
            "seed": config.seed,
            **own,
        },
    }
    return load_recipe(document, config.overrides)


def side_of(name: str, work: Work) -> Side:
    """The side of that name, built on a model of its own."""
    if name in (LORAKIT, PLAIN):
        return Lorakit(work, name)
    others: dict[str, Callable[[Work], Side]] = {PEFT: Peft, FULL: Full, FLOOR: Floor, CEILING: Ceiling}
    return others[name](work)


def _norms(side: str, values: Sequence[float], every: bool) -> Norms:
    total = sum(value**2 for value in values) ** 0.5
    bad = sum(1 for value in values if not 0 < value < float("inf"))
    if (bad if every else not 0 < total < float("inf")) or not values:
        raise TrainingError(
            f"{side}: {bad or 'all'} of {len(values)} trained tensors have a gradient that is missing, zero or no number, so "
            "its time would mean nothing. Expected a gradient for each."
        )
    return Norms(len(values), min(values), max(values), total)
