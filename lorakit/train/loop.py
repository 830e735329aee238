"""The training loop: batches in, a trained adapter out. Distribution and mixed precision are accelerate's."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
from torch import Tensor, nn

from lorakit.data.pack import counts
from lorakit.errors import TrainingError, UsageError
from lorakit.train.base_dropout import BaseDropout
from lorakit.train.config import TrainConfig
from lorakit.train.flat import FlatParameters
from lorakit.train.loss import Batch, Objective
from lorakit.train.optimizer import optimizer_for, set_rate
from lorakit.train.schedule import factor
from lorakit.train.state import TrainState, load_state, save_state
from lorakit.train.world import join

if TYPE_CHECKING:
    from accelerate import Accelerator

Row = dict[str, float]


class Batches(Protocol):
    """What the loop needs of the data: the batches of an epoch, the same for the same number, made when asked for."""

    def __len__(self) -> int: ...
    def make(self, epoch: int, start: int) -> Iterator[Batch]: ...


@dataclass
class Hooks:
    """What a run wants to hear of and to do in between. Each is called after the step that it speaks of."""

    row: Callable[[Row], None] = lambda row: None
    """A row of metrics: training ("loss", "lr", ...) or evaluation ("eval_...")."""
    evaluate: Callable[[], Mapping[str, float]] | None = None
    """Measures the adapter as it is: {"loss": ..., other metrics}."""
    higher_is_better: Callable[[str], bool] = lambda name: name != "loss"
    """Which way a metric is better."""
    checkpoint: Callable[["Trainer"], None] | None = None
    """Saves the whole state."""


class Trainer:
    """One training run: model, trainable parameters, optimizer, state.

    parameters: what is trained (lorakit.parameters(model, name)); rates: id of a parameter -> factor on its learning rate
    (see Method.learning_rates). parts: a batch -> the batches in whose forward passes it is run; the loss must be a sum over
    rows for that. With several processes (see World) each is given its share of a batch's rows by `batches`, an empty
    mapping where it has none, and only the first calls the hook `row`. However the run ends, the model is left in evaluation
    mode and its forward as it was; where it ends by itself, with the best (or last) adapter in place.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        batches: Batches,
        objective: Objective,
        config: TrainConfig,
        hooks: Hooks | None = None,
        rates: Mapping[int, float] | None = None,
        parts: Callable[[Batch], Sequence[Batch]] = lambda batch: (batch,),
    ) -> None:
        if not parameters:
            raise UsageError("nothing to train: the adapter has no trainable parameters.")
        self.world, self.parts = join(), parts
        self.accelerator = _accelerator(config)
        self.config, self.batches, self.objective, self.hooks = config, batches, objective, hooks or Hooks()
        self.parameters = list(parameters)
        _checkpointing(model, config.gradient_checkpointing)
        self.model = self._prepared(model)
        self.base_dropout = BaseDropout(model)
        self.flat = FlatParameters(self.parameters, rates or {})
        self.optimizer = self.accelerator.prepare_optimizer(optimizer_for(config, self.flat), device_placement=False)
        self.state, self.best, self.good = TrainState(), None, self.flat.copy()
        self.total = total_steps(config, len(batches))
        self.making = 0.0  # seconds that the newest step's batches took to make
        self.asked_to_stop = self.interrupted = False

    def _prepared(self, model: nn.Module) -> nn.Module:
        """The model on its device. Autocast is entered where the model is called, so its forward stays its own."""
        forward = model.__dict__.get("forward")  # None but for models with hooks of accelerate
        # No DistributedDataParallel: gradients are summed once a step, in the flat buffers (see World).
        prepared: nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        for key, value in (("_original_forward", None), ("forward", forward)):
            model.__dict__.pop(key, None)
            if value is not None:
                model.__dict__[key] = value
        return prepared

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on from here. Raises OutputError."""
        self.state.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        save_state(folder, self.state, self.flat, self._inner, self.best, self.world)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises FileError where it is damaged or of another model or method."""
        self.flat.bind()
        self.state, self.best = load_state(folder, self.config, self.flat, self._inner, self.world)
        if self.state.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[no-any-return]

    def run(self) -> TrainState:
        """Train to the end, or to Ctrl-C (`interrupted` is then true). Raises TrainingError on a loss that is no number."""
        self.flat.bind()
        self.world.same_values(self.flat.held)
        self.flat.copy_to(self.good)
        try:
            with _stop_on_interrupt(self):
                while self._goes_on():
                    self._epoch()
            # Before the best adapter takes the last one's place: a longer run would go on from the last.
            if self.hooks.checkpoint is not None:
                self.hooks.checkpoint(self)
        finally:
            self._leave()
        return self.state

    def _goes_on(self) -> bool:
        """Whether another step is due; all processes answer alike, whichever of them was asked to stop."""
        self.interrupted = self.world.any(self.asked_to_stop)
        return self.state.step < self.total and not self.interrupted

    def _leave(self) -> None:
        """The model as it was before, but trained."""
        if self.state.step >= self.total and self.best is not None:
            self.flat.restore(self.best)
        self.flat.release()
        self.model.eval()
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()

    def _epoch(self) -> None:
        """The rest of the current epoch, from the state's batch on."""
        state, config = self.state, self.config
        self.model.train()
        source = self.batches.make(state.epoch, state.batch)
        while self._goes_on():
            begin = time.perf_counter()
            group = [batch for _, batch in zip(range(config.accumulate), source, strict=False)]
            self.making = time.perf_counter() - begin
            if not group:
                state.epoch, state.batch = state.epoch + 1, 0
                return
            self.step(group)
            ended = state.batch >= len(self.batches)
            due = state.step % config.eval_every == 0 if config.eval_every else ended
            if self.hooks.evaluate is not None and (due or state.step == self.total):
                self._evaluate()
            if config.save_every and state.step % config.save_every == 0 and self.hooks.checkpoint is not None:
                self.hooks.checkpoint(self)

    def step(self, group: Sequence[Batch]) -> None:
        """One optimizer step over `accumulate` batches; the loss is the mean over the targets of all of them."""
        begin, state = time.perf_counter(), self.state
        rate = self.config.rate * factor(self.config, state.step, self.total)
        set_rate(self._inner, rate)
        if not self.flat.bound:
            self.flat.bind()
        with self.base_dropout.drawing():
            loss = self._backward(group, rate)
        self.flat.gather()
        self.world.add_gradients(self.flat.held)
        norm = self._clip(rate)
        self.flat.copy_to(self.good)
        (self._inner if self.accelerator.scaler is None else self.optimizer).step()
        self.flat.updated()
        seen = [counts(batch) for batch in group if batch]
        examples, tokens = map(int, self.world.sums([sum(one[0] for one in seen), sum(one[1] for one in seen)]))
        seconds = time.perf_counter() - begin + self.making
        state.step, state.batch, state.tokens = state.step + 1, state.batch + len(group), state.tokens + tokens
        state.examples += examples
        state.seconds += seconds
        if state.step % self.config.log_every == 0 or state.step == self.total:
            speed = {"tokens_per_second": tokens / seconds} if tokens else {}  # batches of images have none
            self._log({"loss": loss, "lr": rate, "grad_norm": norm, **speed})

    def _log(self, measured: Row) -> None:
        state = self.state
        epoch = state.epoch + state.batch / len(self.batches)
        self._row({"step": state.step, "epoch": epoch, **measured, "seconds": state.seconds})

    def _row(self, row: Row) -> None:
        if self.world.first:
            self.hooks.row(row)

    def _backward(self, group: Sequence[Batch], rate: float) -> float:
        """Gradients of the mean loss over the group's targets; returns that loss."""
        own = [batch for batch in group if batch]  # of several processes one may have no rows
        count = max(1.0, self.world.sums([sum(self.objective.targets(batch) for batch in own)])[0])
        loss = 0.0
        for part in (part for batch in own for part in self.parts(batch)):
            moved = {key: value.to(self.accelerator.device) for key, value in part.items()}
            with _memory_told(self.state.step + 1):
                with self.accelerator.autocast():
                    total = self.objective.loss(self.model, moved).total
                value = float(total.detach())
                if not math.isfinite(value) and self.world.size == 1:  # several must give up together
                    self._give_up(f"the loss is {value} at step {self.state.step + 1}", rate)
                self.accelerator.backward(total / count)
            loss += value
        loss = self.world.sums([loss])[0]
        if not math.isfinite(loss):
            self._give_up(f"the loss is {loss} at step {self.state.step + 1}", rate)
        return loss / count

    def _clip(self, rate: float) -> float:
        self.accelerator.unscale_gradients(self.optimizer)
        norm = self.flat.clip(self.config.clip)
        if not math.isfinite(norm) and self.config.precision != "fp16":  # fp16: the scaler skips the step by itself
            self.flat.copy_to(self.good)  # their loss was a number
            self._give_up(f"the gradient's norm is {norm} at step {self.state.step + 1}", rate)
        return norm

    def _give_up(self, what: str, rate: float) -> NoReturn:
        """Put the last good adapter in place and raise."""
        if self.best is not None:
            self.flat.restore(self.best)
            kept = f"the best adapter so far (step {self.state.best_step})"
        else:
            self.flat.restore(self.good)
            kept = "the last adapter whose loss was a number" if self.state.step else "the untrained adapter"
        raise TrainingError(
            f"{what} (learning rate {rate:.3g}): stopped. Kept: {kept}. Try a lower train.lr, a longer train.warmup or a "
            f"smaller train.clip{'; or bf16 in place of fp16' if self.config.precision == 'fp16' else ''}."
        )

    def _evaluate(self) -> None:
        if self.hooks.evaluate is None:
            return
        self.model.eval()
        with self.accelerator.autocast():
            metrics, state = dict(self.world.same(dict(self.hooks.evaluate()))), self.state
        self.model.train()
        name = self.config.best_metric
        if name not in metrics:
            raise UsageError(f"train.best_metric is {name!r}, but the evaluation gives {', '.join(metrics)}.")
        value, sign = metrics[name], 1 if self.hooks.higher_is_better(name) else -1
        if math.isfinite(value) and (state.best_value is None or sign * value > sign * state.best_value):
            state.best_value, state.best_step = value, state.step
            self.best = self.flat.copy() if self.config.keep == "best" else None
        self._row({"step": state.step, **{f"eval_{name}": value for name, value in metrics.items()}})
        if not math.isfinite(metrics.get("loss", 0.0)):
            self._give_up(
                f"the eval loss is {metrics['loss']} after step {state.step}",
                float(self.optimizer.param_groups[0]["lr"]),
            )

    good: list[Tensor]  # the newest values whose loss was a number
    best: list[Tensor] | None  # the best values on the eval set; None where keep is "last"


def total_steps(config: TrainConfig, batches: int) -> int:
    """Optimizer steps of a run over `batches` batches an epoch."""
    steps = max(1, math.ceil(batches / config.accumulate)) * config.epochs
    # 1.1 * 10 is a little over 11 in floating point, and must not become 12.
    return min(max(1, math.ceil(steps - 1e-6)), config.max_steps or 2**62)


def _accelerator(config: TrainConfig) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    precision = "no" if config.precision == "fp32" else config.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UsageError(
            "train.precision fp16 needs a GPU, and there is none here. Use fp32 (or bf16 where the CPU has it)."
        )
    if precision == "bf16" and not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported():
        warnings.warn(
            "this CPU has no bf16 arithmetic: train.precision bf16 will be many times slower than fp32.", stacklevel=4
        )
    AcceleratorState._reset_state()  # it outlives a run, and would refuse a second one of another precision
    accelerator = Accelerator(mixed_precision=precision)
    # Its launchers set this in the environment, and each loss would be divided by it: the trainer divides by targets.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def _checkpointing(model: nn.Module, wanted: bool) -> None:
    if not wanted:
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UsageError(
            f"{type(model).__name__} has no gradient checkpointing. Leave train.gradient_checkpointing off."
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _memory_told(step: int) -> Iterator[None]:
    """Say what helps where the memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory at step {step} ({str(error).splitlines()[0]}). Try a smaller train.batch_size (with "
            "train.accumulate for the rest), train.gradient_checkpointing, or a lower data.max_length."
        ) from error


@contextmanager
def _stop_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C lets the step end and stops the run; a second one breaks off at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if trainer.asked_to_stop:
            raise KeyboardInterrupt
        trainer.asked_to_stop = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
