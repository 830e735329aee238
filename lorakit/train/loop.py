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
from lorakit.train.config import TrainConfig
from lorakit.train.loss import Batch, Objective
from lorakit.train.schedule import factor
from lorakit.train.state import TrainState, load_state, restore, save_state, snapshot

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
    (see Method.learning_rates). However the run ends, the model is left in evaluation
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
    ) -> None:
        if not parameters:
            raise UsageError("nothing to train: the adapter has no trainable parameters.")
        self.accelerator = _accelerator(config)
        self.config, self.batches, self.objective, self.hooks = config, batches, objective, hooks or Hooks()
        self.parameters = list(parameters)
        _checkpointing(model, config.gradient_checkpointing)
        groups = _groups(self.parameters, rates or {})
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self._forward = model.__dict__.get("forward")  # None but for models with hooks of accelerate
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.state, self.best, self.good = TrainState(), None, []
        self.total = total_steps(config, len(batches))
        self.interrupted = False

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on from here. Raises OutputError."""
        self.state.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        save_state(folder, self.state, self.parameters, self.optimizer, self.best)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises FileError where it is damaged or of another model or method."""
        self.state, self.best = load_state(folder, self.parameters, self.optimizer)
        if self.state.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def run(self) -> TrainState:
        """Train to the end, or to Ctrl-C (`interrupted` is then true). Raises TrainingError on a loss that is no number."""
        self.good = snapshot(self.parameters)
        try:
            with _stop_on_interrupt(self):
                while self.state.step < self.total and not self.interrupted:
                    self._epoch()
            # Before the best adapter takes the last one's place: a longer run would go on from the last.
            if self.hooks.checkpoint is not None:
                self.hooks.checkpoint(self)
        finally:
            self._leave()
        return self.state

    def _leave(self) -> None:
        """The model as it was before, but trained."""
        if self.state.step >= self.total and self.best is not None:
            restore(self.parameters, self.best)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        for key, value in (("_original_forward", None), ("forward", self._forward)):  # autocast's wrapping
            self.model.__dict__.pop(key, None)
            if value is not None:
                self.model.__dict__[key] = value

    def _epoch(self) -> None:
        """The rest of the current epoch, from the state's batch on."""
        state, config = self.state, self.config
        self.model.train()
        source = self.batches.make(state.epoch, state.batch)
        while state.step < self.total and not self.interrupted:
            group = [batch for _, batch in zip(range(config.accumulate), source, strict=False)]
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
        rate = self.config.lr * factor(self.config, state.step, self.total)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate * settings["ratio"]
        loss, norm = self._backward(group, rate), self._clip(rate)
        self.good = snapshot(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        examples, tokens = (sum(one) for one in zip(*map(counts, group), strict=True))
        seconds = time.perf_counter() - begin
        state.step, state.batch, state.tokens = state.step + 1, state.batch + len(group), state.tokens + tokens
        state.examples += examples
        state.seconds += seconds
        if state.step % self.config.log_every == 0 or state.step == self.total:
            speed = {"tokens_per_second": tokens / seconds} if tokens else {}  # batches of images have none
            self._log({"loss": loss, "lr": rate, "grad_norm": norm, **speed})

    def _log(self, measured: Row) -> None:
        state = self.state
        epoch = state.epoch + state.batch / len(self.batches)
        self.hooks.row({"step": state.step, "epoch": epoch, **measured, "seconds": state.seconds})

    def _backward(self, group: Sequence[Batch], rate: float) -> float:
        """Gradients of the mean loss over the group's targets; returns that loss."""
        count = max(1, sum(self.objective.targets(batch) for batch in group))
        loss = 0.0
        for batch in group:
            moved = {key: value.to(self.accelerator.device) for key, value in batch.items()}
            with _memory_told(self.state.step + 1):
                part = self.objective.loss(self.model, moved)
                value = float(part.total.detach())
                if not math.isfinite(value):
                    self._give_up(f"the loss is {value} at step {self.state.step + 1}", rate)
                self.accelerator.backward(part.total / count)
            loss += value
        return loss / count

    def _clip(self, rate: float) -> float:
        self.accelerator.unscale_gradients(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf))
        if not math.isfinite(norm) and self.config.precision != "fp16":  # fp16: the scaler skips the step by itself
            self.good = snapshot(self.parameters)  # their loss was a number
            self._give_up(f"the gradient's norm is {norm} at step {self.state.step + 1}", rate)
        return norm

    def _give_up(self, what: str, rate: float) -> NoReturn:
        """Put the last good adapter in place and raise."""
        if self.best is not None:
            restore(self.parameters, self.best)
            kept = f"the best adapter so far (step {self.state.best_step})"
        else:
            restore(self.parameters, self.good)
            kept = "the last adapter whose loss was a number" if self.state.step else "the untrained adapter"
        raise TrainingError(
            f"{what} (learning rate {rate:.3g}): stopped. Kept: {kept}. Try a lower train.lr, a longer train.warmup or a "
            f"smaller train.clip{'; or bf16 in place of fp16' if self.config.precision == 'fp16' else ''}."
        )

    def _evaluate(self) -> None:
        if self.hooks.evaluate is None:
            return
        self.model.eval()
        metrics, state = dict(self.hooks.evaluate()), self.state
        self.model.train()
        name = self.config.best_metric
        if name not in metrics:
            raise UsageError(f"train.best_metric is {name!r}, but the evaluation gives {', '.join(metrics)}.")
        value, sign = metrics[name], 1 if self.hooks.higher_is_better(name) else -1
        if math.isfinite(value) and (state.best_value is None or sign * value > sign * state.best_value):
            state.best_value, state.best_step = value, state.step
            self.best = snapshot(self.parameters) if self.config.keep == "best" else None
        self.hooks.row({"step": state.step, **{f"eval_{name}": value for name, value in metrics.items()}})
        if not math.isfinite(metrics.get("loss", 0.0)):
            self._give_up(
                f"the eval loss is {metrics['loss']} after step {state.step}", self.optimizer.param_groups[0]["lr"]
            )

    good: list[Tensor]  # the newest values whose loss was a number
    best: list[Tensor] | None  # the best values on the eval set; None where keep is "last"


def _groups(parameters: Sequence[nn.Parameter], rates: Mapping[int, float]) -> list[dict[str, object]]:
    """The optimizer's groups: parameters of one learning rate together. ratio: the group's rate over the run's."""
    ratios = [rates.get(id(parameter), 1.0) for parameter in parameters]
    return [
        {"params": [one for one, own in zip(parameters, ratios, strict=True) if own == ratio], "ratio": ratio}
        for ratio in dict.fromkeys(ratios)
    ]


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
    if precision == "bf16" and not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        warnings.warn(
            "this CPU has no bf16 arithmetic: train.precision bf16 will be many times slower than fp32.", stacklevel=4
        )
    AcceleratorState._reset_state()  # it outlives a run, and would refuse a second one of another precision
    accelerator = Accelerator(mixed_precision=precision)
    if accelerator.num_processes > 1:
        raise UsageError("training over several processes is not supported yet. Start a single process.")
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
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
