"""What all sides of a row share: one base model, the examples, and which of them make each round."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import blocks
from lorakit.bench.config import UPPER_THIRD, BenchConfig, RowKind
from lorakit.bench.shapes import SHAPES, build
from lorakit.data import IGNORE, Dataset, Encoded, collate, encode_all, load_examples
from lorakit.errors import UsageError
from lorakit.models import Loaded, list_models, load, longest_row
from lorakit.run.check import TASK_OF
from lorakit.run.device import best_device

UNMEASURED = 2
"""Rounds before the measured ones: the first warms up, the second's gradients are looked at (at B = 0 A has none yet)."""
FREE_STEPS = 16
"""PEFT's steps in a round of the row `free`: enough examples for lorakit to choose from."""
CHECKED = 4
"""Batches on which the loss at the end is measured."""
TASKS = ("causal-lm", "sequence-classification")


@dataclass(frozen=True)
class Material:
    """A loaded base and the encoded data set (empty without one). alone: one side only, which may have the base itself."""

    config: BenchConfig
    loaded: Loaded
    examples: Sequence[Encoded]
    alone: bool = False

    @property
    def task(self) -> str:
        return self.loaded.task

    def model(self, *, own: bool = False) -> Any:
        """A copy of the base for one side. Frozen weights are shared by all; own: a copy of these too, to be trained."""
        base = self.loaded.model
        if self.alone:
            return base
        shared = {} if own else {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in base.parameters()}
        return copy.deepcopy(base, shared)

    def layers(self, kind: RowKind) -> list[int] | None:
        """Numbers of the adapted layers; None = all."""
        asked = self.config.layers or (UPPER_THIRD if kind.upper else None)
        if asked is None:
            return None
        count = len(blocks_of(self.loaded.model))
        numbers = range(count - max(1, count // 3), count) if asked == UPPER_THIRD else _numbers(asked)
        if not all(0 <= number < count for number in numbers):
            raise UsageError(f"layers: expected numbers from 0 to {count - 1}, got {asked!r}.")
        return list(numbers)


@dataclass(frozen=True)
class Work:
    """The examples of a row's rounds. rounds: numbers of `rows`, UNMEASURED rounds first.

    checked: numbers of the rows on which the loss at the end is measured.
    """

    kind: RowKind
    material: Material
    rows: Sequence[Encoded]
    rounds: Sequence[Sequence[int]]
    checked: Sequence[int]

    def padded(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """One batch, padded to its longest row."""
        loaded = self.material.loaded
        batch = collate(
            [self.rows[number] for number in numbers], pad_id=loaded.tokenizer.pad_token_id, task=loaded.task
        )
        return {key: value.to(loaded.model.device) for key, value in batch.items()}

    def chunks(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """`numbers` in optimizer steps of `batch` examples."""
        size = self.material.config.batch
        return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]

    def tokens(self, numbers: Sequence[int]) -> int:
        """Real tokens: padding is none."""
        return sum(len(self.rows[number].input_ids) for number in numbers)

    def heaviest(self) -> Sequence[int]:
        """The round whose padded batches are largest."""
        return max(
            self.rounds,
            key=lambda numbers: max(
                len(chunk) * max(len(self.rows[n].input_ids) for n in chunk) for chunk in self.chunks(numbers)
            ),
        )


def read(config: BenchConfig, *, alone: bool = False) -> Material:
    """Load what `config` names. Raises UsageError, ModelError, DataError."""
    device = _device(config)
    dataset = None if config.data is None else _dataset(config, config.data)
    task = config.task or _task(config, dataset)
    if task not in TASKS:
        raise UsageError(f"task: expected one of {', '.join(TASKS)}, got {task!r}.")
    if config.model in SHAPES:
        loaded = _shape(config, task, dataset, device)
    else:
        loaded = _load(config, task, dataset, device)
    _without_dropout(loaded.model)
    loaded.model.config.use_cache = False  # as transformers' Trainer does
    return Material(config, loaded, _encoded(dataset, loaded), alone)


def work_of(kind: RowKind, material: Material) -> Work:
    """The rounds of a row. Raises UsageError where the row does not go with the model or the data."""
    config = material.config
    if kind.masked and material.task != "causal-lm":
        raise UsageError(f"the row {kind.name!r} masks tokens from a language model's loss; this model classifies.")
    count = UNMEASURED + config.rounds
    if kind.real:
        return _real_work(kind, material, count)
    rows = _drawn(kind, material, config.batch * (1 if kind.upper else count))
    one = list(range(config.batch))
    rounds = [one] * count if kind.upper else [[n + i * config.batch for n in one] for i in range(count)]
    return Work(kind, material, rows, rounds, one)


def _real_work(kind: RowKind, material: Material, count: int) -> Work:
    config = material.config
    sizes = [config.batch * (FREE_STEPS if kind.name == "free" and i >= UNMEASURED else 1) for i in range(count)]
    if sum(sizes) > len(material.examples):
        raise UsageError(
            f"the row {kind.name!r} needs {sum(sizes)} examples for {config.rounds} rounds of batch {config.batch}, and "
            f"{config.data} gives {len(material.examples)}. Take fewer rounds, a smaller batch, more data (or a higher limit)."
        )
    draw = torch.Generator().manual_seed(config.seed)  # transformers' Trainer draws its order the same way
    order = torch.randperm(len(material.examples), generator=draw).tolist()
    rounds, begin = [], 0
    for size in sizes:
        rounds.append(order[begin : begin + size])
        begin += size
    unseen = order[begin:] or order
    return Work(kind, material, material.examples, rounds, unseen[: CHECKED * config.batch])


def _drawn(kind: RowKind, material: Material, count: int) -> list[Encoded]:
    """Examples of random tokens, all of the same length."""
    config, model = material.config, material.loaded.model
    limit = longest_row(model, material.loaded.tokenizer)
    if limit is not None and config.length > limit:
        raise UsageError(f"length must be at most {limit} for {config.model}, not {config.length}.")
    draw = torch.Generator().manual_seed(config.seed)
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(min(3, vocab - 1), vocab, (count, config.length), generator=draw).tolist()
    if material.task != "causal-lm":
        labels = torch.randint(model.config.num_labels, (count,), generator=draw).tolist()
        return [Encoded(row, label, line=1) for row, label in zip(ids, labels, strict=True)]
    hidden = round(config.masked * config.length) if kind.masked else 0
    return [Encoded(row, [IGNORE] * hidden + row[hidden:], line=1) for row in ids]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks, in order. Raises UsageError where it has no single list of them."""
    found = blocks(model)
    if found is None:
        raise UsageError(f"{type(model).__name__} has no single list of layers, so none of them can be chosen.")
    return list(found[1])


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"layers: expected {UPPER_THIRD} or numbers such as 8,9,10; got {text!r}.") from error


def _device(config: BenchConfig) -> str | None:
    best = best_device()
    if config.device is None:
        return best
    if config.device.partition(":")[0] != (best or "cpu"):
        raise UsageError(
            f"device {config.device!r}: training takes {best or 'cpu'} on this machine. Leave --device out"
            + (", or hide the accelerator from the process (CUDA_VISIBLE_DEVICES=)." if best else ".")
        )
    return config.device


def _dataset(config: BenchConfig, source: str) -> Dataset:
    return load_examples(source, format=config.format, limit=config.limit, seed=config.seed)


def _task(config: BenchConfig, dataset: Dataset | None) -> str:
    if dataset is not None:
        return TASK_OF[type(dataset.examples[0])]
    if config.model in SHAPES:
        return SHAPES[config.model][0]
    kinds = {one.name: one.kind for one in list_models()}
    return "sequence-classification" if kinds.get(config.model) == "encoder" else "causal-lm"


def _shape(config: BenchConfig, task: str, dataset: Dataset | None, device: str | None) -> Loaded:
    if dataset is not None:
        raise UsageError(
            f"{config.model} is a shape with random weights and has no tokenizer for {config.data}. Name a model that has "
            "one (lorakit models)."
        )
    if task != SHAPES[config.model][0]:
        raise UsageError(f"the shape {config.model} is built for {SHAPES[config.model][0]}, not for {task}.")
    return build(config.model, dtype=config.dtype, device=device, seed=config.seed)


def _load(config: BenchConfig, task: str, dataset: Dataset | None, device: str | None) -> Loaded:
    torch.manual_seed(config.seed)  # a new head is drawn from the global generator
    classifies = task != "causal-lm"
    names = None if dataset is None else dataset.label_names
    regression = dataset is not None and bool(dataset.regression)
    return load(
        config.model,
        task=task,
        dtype=config.dtype,
        label_names=names if classifies else None,
        num_labels=2 if classifies and names is None and not regression else None,
        regression=classifies and regression,
        device=device,
        progress=True,
    )


def _encoded(dataset: Dataset | None, loaded: Loaded) -> list[Encoded]:
    if dataset is None:
        return []
    longest = longest_row(loaded.model, loaded.tokenizer)
    return encode_all(dataset, loaded.tokenizer, task=loaded.task, max_length=longest, truncate=True)


def _without_dropout(model: nn.Module) -> None:
    """Switch off the base's own dropout: its noise would hide whether two sides learn the same."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
