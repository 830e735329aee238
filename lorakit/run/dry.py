"""`lorakit train --dry-run`: what a run would take, from its first steps; nothing is written."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorakit.attach.api import count_parameters, detach
from lorakit.data import Encoded
from lorakit.data.pack import counts
from lorakit.errors import UsageError
from lorakit.run.check import check_recipe
from lorakit.run.device import model_bytes, peak_memory
from lorakit.run.diffusion.config import TEXT_TO_IMAGE
from lorakit.run.listen import Listener
from lorakit.run.recipe import Recipe, load_recipe
from lorakit.run.subject import NAME
from lorakit.run.train import Run, kind_of
from lorakit.run.turns import wait
from lorakit.train.loop import Hooks, Trainer
from lorakit.train.loss import Batch
from lorakit.train.optimizer import state_of

STEPS = 3
"""Optimizer steps that are taken; the first warms up and is not measured."""


@dataclass(frozen=True)
class Memory:
    """What a run holds, in bytes, term by term.

    adapter: its tensors, and their newest values whose loss was a number, which the trainer keeps.
    activations: what the backward pass of the largest batch tried keeps, scaled to the epoch's largest. Temporaries of
    single operations come on top; peak: what this process really held in the steps tried.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Epoch:
    """One epoch's batches. positions: of all tokens and padding; targets: tokens (rows of a classification) with loss.

    tokens, positions, padding: None for images, which have none. padding: the part of all positions that is padding.
    largest: positions of the largest batch.
    """

    examples: int
    batches: int
    targets: int
    tokens: int | None
    positions: int | None
    padding: float | None
    loss_share: float | None
    largest: int | None


@dataclass(frozen=True)
class DryRun:
    """What the run of a recipe would take. seconds: of training alone, without evaluation; step_seconds: of steps tried.

    rate: the peak learning rate.
    """

    model: str
    task: str
    trainable: int
    total: int
    memory: Memory
    epoch: Epoch
    rate: float
    steps: int
    step_seconds: Sequence[float]
    seconds: float
    loss: float | None


def dry_run(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    overrides: Sequence[str] = (),
    listener: Listener | None = None,
) -> DryRun:
    """Load all that the run of a recipe would, take its first steps, and tell what the whole run would take.

    overrides: "train.lr=1e-4" each. The output folder is neither read nor written; the adapter is taken off in the end.
    Raises what `train` raises before it begins.
    """
    resolved = load_recipe(recipe, overrides)
    check_recipe(resolved, own_loss=False)
    if resolved.task == TEXT_TO_IMAGE:
        from lorakit.models.diffusion import require_diffusers
        from lorakit.run.diffusion.check import check_text_to_image

        check_text_to_image(resolved)
        require_diffusers()
    run = kind_of(resolved.task)(resolved, None, listener or Listener())
    if run.world.size > 1:
        raise UsageError("a dry run tells what one process takes: start it in one.")
    run.read_data()
    run.load_model()
    run.encode()
    trainer = run.trainer()
    heard: list[Mapping[str, float]] = []
    trainer.hooks = Hooks(row=heard.append)
    run.listener.stage("looking at an epoch's batches")
    epoch = _epoch(run, trainer)
    run.listener.stage(f"trying {min(STEPS, trainer.total)} steps")
    try:
        return _measured(run, trainer, epoch, heard)
    finally:
        trainer.flat.release()
        detach(run.model, NAME)
        run.model.eval()


def _measured(run: Run, trainer: Trainer, epoch: Epoch, heard: Sequence[Mapping[str, float]]) -> DryRun:
    size = run.recipe.train.accumulate
    wanted = min(STEPS, trainer.total, -(-epoch.batches // size))
    begin = time.perf_counter()
    made = list(islice(trainer.batches.make(0, 0), wanted * size))
    making = (time.perf_counter() - begin) / wanted  # of a step's batches
    groups = [made[begin : begin + size] for begin in range(0, len(made), size)]
    trainer.model.train()
    passes = [part for batch in made for part in trainer.parts(batch)]
    activations = _activations(trainer, max(passes, key=_positions), epoch.largest)
    times = []
    for done, group in enumerate(groups):
        times.append(making + _timed(trainer, group))
        run.listener.progress(done + 1, len(groups))
    tried = list(zip(groups, times, strict=True))
    measured = tried[1:] or tried  # a run of one step has none to warm up with
    steps = trainer.total
    counted = count_parameters(run.model)
    return DryRun(
        model=run.recipe.model,
        task=run.recipe.task,
        trainable=counted.trainable,
        total=counted.total,
        memory=_memory(run, trainer, activations),
        epoch=epoch,
        rate=run.settings.rate,
        steps=steps,
        step_seconds=[seconds for _, seconds in measured],
        seconds=_whole(measured, epoch, steps, size, lambda batch: sum(map(_positions, trainer.parts(batch)))),
        loss=heard[-1]["loss"] if heard else None,
    )


def _timed(trainer: Trainer, group: Sequence[Batch]) -> float:
    wait()
    begin = time.perf_counter()
    trainer.step(group)
    wait()
    return time.perf_counter() - begin


def _whole(
    measured: Sequence[tuple[Sequence[Batch], float]],
    epoch: Epoch,
    steps: int,
    size: int,
    passed: Callable[[Batch], int],
) -> float:
    """Seconds of all steps: by positions, where batches have any (the first ones may be longer than most), else by steps."""
    seconds = sum(one for _, one in measured)
    if epoch.positions is None:
        return seconds / len(measured) * steps
    tried = sum(passed(batch) for group, _ in measured for batch in group)
    return seconds / max(1, tried) * epoch.positions / epoch.batches * min(size, epoch.batches) * steps


def _epoch(run: Run, trainer: Trainer) -> Epoch:
    """Count the first epoch's batches, as they will be made."""
    rows = run.train_rows
    if not all(isinstance(row, Encoded) for row in rows):  # images: to make their batches would be to read them all
        return Epoch(len(rows), len(trainer.batches), len(rows), None, None, None, None, None)
    tokens = targets = examples = positions = largest = 0
    total = len(trainer.batches)
    for done, batch in enumerate(trainer.batches.make(0, 0)):
        own_examples, own_tokens = counts(batch)
        examples, tokens = examples + own_examples, tokens + own_tokens
        targets += trainer.objective.targets(batch)
        passes = [_positions(part) for part in trainer.parts(batch)]
        positions, largest = positions + sum(passes), max(largest, *passes)
        run.listener.progress(done + 1, total)
    share = None if run.trains_head else targets / max(1, tokens)
    return Epoch(examples, total, targets, tokens, positions, 1 - tokens / max(1, positions), share, largest)


def _positions(batch: Batch) -> int:
    """Tokens and padding of a batch; rows of one that has no tokens."""
    inputs = batch.get("input_ids")
    return next(iter(batch.values())).shape[0] if inputs is None else inputs.numel()


def _memory(run: Run, trainer: Trainer, activations: int) -> Memory:
    parameters = trainer.parameters
    state = list(state_of(trainer.optimizer, trainer.flat).values())
    return Memory(
        base=model_bytes(run.model),
        adapter=_bytes(parameters) + _bytes(trainer.good),
        gradients=_bytes(parameters),
        optimizer=_bytes(state),
        activations=activations,
        peak=peak_memory(),
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activations(trainer: Trainer, batch: Batch, largest: int | None) -> int:
    """Bytes that autograd keeps between a batch's forward and its backward pass, each storage once, the weights left out."""
    own = {_storage(tensor) for tensor in _held(trainer.model)}
    kept: dict[int, Tensor] = {}  # the tensors themselves: an address is another's as soon as its tensor is gone

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() and _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor.detach())
        return tensor

    moved = {key: value.to(trainer.accelerator.device) for key, value in batch.items()}
    with saved_tensors_hooks(pack, lambda tensor: tensor), trainer.accelerator.autocast():
        part = trainer.objective.loss(trainer.model, moved)
    count = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del part
    return count if largest is None else round(count * largest / _positions(batch))


def _held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
