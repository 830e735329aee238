"""Many training runs in step: one forward and one backward pass for all, then each its own clip, schedule and AdamW.

The rows of all members stand in one batch, each with its member's adapter (lorakit.route), so the base's products are
shared; a member's gradient comes from its own rows alone. Everything else of a run is lorakit.train.loop's Trainer.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.api import Restore, route, use
from lorakit.errors import TrainingError
from lorakit.sweep.loss import joint_losses, together
from lorakit.train.loop import Row, Trainer
from lorakit.train.loss import Batch
from lorakit.train.prune import last_block_pruned

POSITIONS = 1024
"""Tokens and padding of a pass on a CPU: the base's products are at their best from here on, and larger activations only leave
its caches (eight adapters of 8 x 64 tokens each in one pass took 1.09 times as long as one after another)."""


class MemberTrainer(Trainer):
    """A trainer whose gradients somebody else computes. given: the loss of the pass that left them; share: its seconds."""

    given = 0.0
    share = 0.0

    def groups(self) -> Iterator[list[Batch]]:
        """The batches of each step. When the next is asked for, the gradients of the last must be in place: the step is made,
        and the evaluation that is due after it. Raises TrainingError on a loss that is no number."""
        state, config = self.state, self.config
        self.flat.bind()
        self.flat.copy_to(self.good)
        while state.step < self.total:
            source = self.batches.make(state.epoch, state.batch)
            while state.step < self.total:
                group = [batch for _, batch in zip(range(config.accumulate), source, strict=False)]
                if not group:
                    state.epoch, state.batch = state.epoch + 1, 0
                    break
                yield group
                self.step(group)
                ended = state.batch >= len(self.batches)
                due = state.step % config.eval_every == 0 if config.eval_every else ended
                if self.hooks.evaluate is not None and (due or state.step == self.total):
                    self._evaluate()

    def _backward(self, group: Sequence[Batch], rate: float) -> float:
        """The loss alone: the gradients came with everyone's."""
        self.state.seconds += self.share
        if not math.isfinite(self.given):
            self._give_up(f"the loss is {self.given} at step {self.state.step + 1}", rate)
        self.flat.gather()
        return self.given

    def _log(self, measured: Row) -> None:
        """Without tokens a second: the pass was everyone's."""
        super()._log({key: value for key, value in measured.items() if key != "tokens_per_second"})


@dataclass
class Turn:
    """One member's forward passes of a step that is being made. count: its targets, over all of them."""

    name: str
    trainer: MemberTrainer
    parts: Sequence[Batch]
    losses: list[Tensor]
    count: int


class JointTrainer:
    """Trains `members` (adapter's name -> trainer) on one model, to each one's own end.

    model: with the adapters attached, trainable. task, pad_id: of the batches. smoothing: label smoothing, all members'.
    stepped: called after each step with (steps done by the longest run, its total). failed: name -> what ended a member early.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Mapping[str, MemberTrainer],
        *,
        task: str,
        pad_id: int,
        smoothing: float = 0.0,
        stepped: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.model, self.members = model, dict(members)
        self.task, self.pad_id, self.smoothing, self.stepped = task, pad_id, smoothing, stepped
        self.failed: dict[str, TrainingError] = {}
        self._layout: tuple[tuple[str, int], ...] = ()
        self._before: Restore | None = None

    def run(self) -> None:
        """A member whose loss or gradient is no number ends early, with the last good adapter in place; the others go on."""
        for turns in self.steps():
            self.stepped(max(one.trainer.state.step for one in turns) + 1, max(one.trainer.total for one in turns))

    def steps(self) -> Iterator[Sequence[Turn]]:
        """The same, one pass at a time: what was passed is given before the members make their steps. Close it to leave early;
        nobody else may switch the model's adapters in between."""
        sources = {name: trainer.groups() for name, trainer in self.members.items()}
        self.model.train()
        try:
            while turns := self._turns(sources):
                self._pass(turns)
                yield turns
        finally:
            for trainer in self.members.values():
                trainer._leave()
            if self._before is not None:
                self._before.__exit__(None, None, None)
                self._before, self._layout = None, ()

    def _turns(self, sources: dict[str, Iterator[list[Batch]]]) -> list[Turn]:
        """Have every member make the step whose gradients are there, and give its next batches."""
        turns = []
        for name in list(sources):
            trainer = self.members[name]
            try:
                group = next(sources[name])
            except StopIteration:
                del sources[name]
                continue
            except TrainingError as error:
                self.failed[name] = error
                del sources[name]
                continue
            count = max(1, sum(trainer.objective.targets(batch) for batch in group))
            parts = [part for batch in group for part in trainer.parts(batch)]
            turns.append(Turn(name, trainer, parts, [], count))
        return turns

    def _pass(self, turns: Sequence[Turn]) -> None:
        """The gradients of every member's mean loss, and that loss."""
        begin = time.perf_counter()
        for i in range(max(len(one.parts) for one in turns)):
            for here in _groups([one for one in turns if len(one.parts) > i], i):
                with here[0].trainer.base_dropout.drawing():
                    self._pass_of(here, [one.parts[i] for one in here])
        share = (time.perf_counter() - begin) / len(turns)
        for one in turns:
            one.trainer.given = float(torch.stack(one.losses).double().sum()) / one.count
            one.trainer.share = share

    def _pass_of(self, here: Sequence[Turn], parts: Sequence[Batch]) -> None:
        """One forward and backward pass of some members' rows."""
        rows = [_rows(part) for part in parts]
        self._switch(tuple(zip((one.name for one in here), rows, strict=True)))
        sums = self._losses(here[0].trainer, together(parts, self.pad_id), rows)
        weights = sums.new_tensor([1 / one.count for one in here])
        (sums * weights).sum().backward()  # type: ignore[no-untyped-call]
        for one, value in zip(here, sums.detach(), strict=True):
            one.losses.append(value)

    def _losses(self, trainer: MemberTrainer, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Each member's summed loss. trainer: any of them: they compute in one precision."""
        moved = {key: value.to(trainer.accelerator.device) for key, value in batch.items()}
        pruned = last_block_pruned(self.model, moved) if trainer.config.prune_last_block else nullcontext()
        with _memory_told(trainer.state.step + 1, len(rows)), trainer.accelerator.autocast(), pruned:
            return joint_losses(self.model, moved, rows, self.task, self.smoothing)

    def _switch(self, layout: tuple[tuple[str, int], ...]) -> None:
        """Have each member's rows take its adapter. One member alone is simply on: any method can be trained so."""
        if layout == self._layout:
            return
        names: list[Any] = [name for name, rows in layout for _ in range(rows)]
        before = use(self.model, layout[0][0]) if len(layout) == 1 else route(self.model, names)
        self._before, self._layout = self._before or before, layout


@contextmanager
def _memory_told(step: int, members: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory at step {step} of {members} adapters ({str(error).splitlines()[0]}). Train fewer at once "
            "(--at-once), or with a smaller train.pass_tokens."
        ) from error


def _groups(turns: Sequence[Turn], i: int) -> Iterator[Sequence[Turn]]:
    """The members whose i-th parts are passed together: neighbours, as many as POSITIONS allow on a CPU; all on a GPU."""
    if turns[0].trainer.accelerator.device.type != "cpu":
        yield turns
        return
    begin, rows, longest = 0, 0, 0
    for at, one in enumerate(turns):
        more, length = _rows(one.parts[i]), _length(one.parts[i])
        if at > begin and (rows + more) * max(longest, length) > POSITIONS:
            yield turns[begin:at]
            begin, rows, longest = at, 0, 0
        rows, longest = rows + more, max(longest, length)
    yield turns[begin:]


def _length(batch: Batch) -> int:
    """Tokens of a row; of images, which bring no such count, 1."""
    return batch["input_ids"].shape[1] if "input_ids" in batch else 1


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]
