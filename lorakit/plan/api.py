"""plan: what adapting a model takes, method by method."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import output_head
from lorakit.attach.api import attach, count_parameters, detach, parameters
from lorakit.attach.host import host_of
from lorakit.attach.method import Method, Several
from lorakit.errors import AdapterError, LorakitError, TargetError, UsageError
from lorakit.methods.kept import kept_of, with_head
from lorakit.methods.lora import LoRA
from lorakit.models import parse_dtype
from lorakit.models.load import NEW_HEADS
from lorakit.plan.depth import DEEP, DEPTHS, blocks, continued, shortened
from lorakit.plan.gpus import smallest
from lorakit.plan.memory import check_optimizer, memory_of
from lorakit.plan.paper import figures
from lorakit.plan.result import Plan, Row
from lorakit.plan.source import Blueprint, find
from lorakit.plan.targets import spelt_out
from lorakit.plan.trace import Traced, Work, trace

FULL = "full"
"""The name of full fine-tuning, where a method is expected."""
DEFAULTS: tuple[LoRA, ...] = (
    LoRA(r=1, target_modules=["q", "v"]),
    LoRA(r=4, target_modules=["q", "v"]),
    LoRA(r=8, target_modules=["q", "k", "v", "o"]),
    LoRA(r=8),
    LoRA(r=64),
)
"""What a plan compares with full fine-tuning where no method is asked for."""
_NAME = "plan"


def plan(
    model: str | os.PathLike[str] | Any,
    method: "Method | str | Sequence[Method | str | Sequence[Method]] | None" = None,
    *,
    batch: int = 8,
    length: int = 512,
    dtype: str | torch.dtype | None = None,
    adapter_dtype: str | torch.dtype | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    task: str | None = None,
    device: str = "cuda",
) -> Plan:
    """Parameters, memory, file sizes and FLOPs of a training step, without allocating a weight.

    model: a name in lorakit.plan.SHAPES, a folder with config.json, a hub id (its config.json alone is fetched), a transformers
    config or model. method: one or several, as for lorakit.attach; "full" is full fine-tuning, which always comes first; a list
    among several: methods that adapt together; None: a comparison of LoRA's. target_modules of a LoRA may be short
    (lorakit.plan.targets): q, k, v, o, gate, up, down.
    batch, length: rows of a forward pass and tokens of a row, none of them padding, all of them targets.
    dtype: of the base's weights and the activations; None: the named shape's, else float32, as lorakit.models.load.
    adapter_dtype: of the adapter; None: as attach, its neighbour's. optimizer: a key of lorakit.plan.OPTIMIZERS.
    checkpointing: recompute each block in the backward pass. device: "cuda" or "cpu": dropout and AdamW differ in what they keep.
    Raises UsageError, ModelError, and TargetError for a method that has no place in the model.
    """
    for name, number in (("batch", batch), ("length", length)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, not {number!r}.")
    if device not in ("cuda", "cpu"):
        raise UsageError(f"device must be 'cuda' or 'cpu', not {device!r}.")
    check_optimizer(optimizer)
    methods = _methods(method)
    blueprint = find(model, task)
    if blueprint.task == "feature-extraction":
        raise UsageError("feature-extraction is no training task: give task.")
    kind = parse_dtype(dtype) if dtype is not None else _own_dtype(blueprint)
    own = None if adapter_dtype is None else parse_dtype(adapter_dtype)
    work = Work(batch, length, blueprint.task, checkpointing, device)
    planner = _Planner(blueprint, work, kind, own, optimizer)
    full = planner.row(FULL, None)
    rows = (full, *(planner.row(one, full) for one in methods))
    if own is None and kind.itemsize < 4 and methods:
        planner.notes.append(
            f"the adapters are planned in {str(kind).removeprefix('torch.')}, as attach makes them and the paper counts them; "
            "lorakit train trains them in float32 (adapter_dtype, --adapter-dtype float32)."
        )
    return Plan(
        blueprint.name,
        blueprint.task,
        full.total,
        batch,
        length,
        str(kind).removeprefix("torch."),
        checkpointing,
        optimizer,
        device,
        rows,
        figures(blueprint.shape, rows),
        tuple(dict.fromkeys(planner.notes)),
    )


def _methods(asked: Any) -> list[Method]:
    """The methods to compare with full fine-tuning."""
    if asked is None:
        return list(DEFAULTS)
    found = []
    for one in asked if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]:
        if isinstance(one, Method):
            found.append(one)
        elif isinstance(one, Sequence) and not isinstance(one, str):
            found.append(Several(tuple(one)))
        elif one != FULL:
            raise UsageError(f"a method is lorakit.LoRA(r=8), or another Method, or {FULL!r}; not {one!r}.")
    return found


def _own_dtype(blueprint: Blueprint) -> torch.dtype:
    return blueprint.dtype if blueprint.shape is not None and blueprint.dtype is not None else torch.float32


@dataclass(frozen=True)
class _Sizes:
    """A method on a model. trained: its tensors; total: numbers that it computes with; weights: bytes of base and adapter."""

    trained: Sequence[Tensor]
    trainable: int
    head: int
    total: int
    weights: int


class _Planner:
    """Puts one method after another on one model, and on short forms of it where it is deep."""

    def __init__(
        self, blueprint: Blueprint, work: Work, dtype: torch.dtype, adapter_dtype: torch.dtype | None, optimizer: str
    ) -> None:
        self.work, self.dtype, self.adapter_dtype, self.optimizer = work, dtype, adapter_dtype, optimizer
        self.model = blueprint.build(dtype)
        paths = blocks(self.model)
        self.depth = len(self.model.get_submodule(paths[0])) if paths else 0  # type: ignore[arg-type]
        depths = DEPTHS if self.depth > DEEP else ()
        self.short = {depth: shortened(self.model, paths, depth) for depth in depths}
        self.notes: list[str] = []

    def row(self, method: Method | str, full: Row | None) -> Row:
        with self._on(self.model, method) as sizes:
            traced = self._traced(method, sizes)
        own, memory, fits = _bytes(sizes.trained), None, None
        if traced is not None:
            memory = memory_of(sizes.weights, sizes.trained, traced, optimizer=self.optimizer, device=self.work.device)
            fits = smallest(memory.peak, bfloat16=self.dtype == torch.bfloat16)
        return Row(
            method=_in_words(method),
            trainable=sizes.trainable,
            head=sizes.head,
            total=sizes.total,
            ratio=(full.total if full else sizes.total) / sizes.trainable,
            checkpoint_bytes=own,
            hundred_bytes=100 * own if full is None else full.checkpoint_bytes + 100 * own,
            memory=memory,
            flops=traced.flops if traced else None,
            flops_ratio=_over(traced, full),
            fits=fits,
        )

    @contextmanager
    def _on(self, model: nn.Module, method: Method | str) -> Iterator[_Sizes]:
        """`model` with the method on it, until the block ends."""
        base = list(model.parameters())
        weights = _bytes([*base, *model.buffers()])
        if not isinstance(method, Method):
            count = sum(tensor.numel() for tensor in base)
            yield _Sizes(base, count, 0, count, weights)
        else:
            attach(model, self._filled(method, model), _NAME, dtype=self.adapter_dtype)
            own, counts = list(parameters(model, _NAME)), count_parameters(model)
            head = self._head_size(model)
            try:
                yield _Sizes(own, counts.trainable - head, head, counts.total - head, weights + _bytes(own))
            finally:
                detach(model, _NAME)
        for parameter in model.parameters():
            parameter.grad = None

    def _head_size(self, model: nn.Module) -> int:
        """Numbers of the task's own head that the method on the model trains in full."""
        head = output_head(model) if self.work.task in NEW_HEADS else None
        return sum(tensor.numel() for tensor in kept_of(host_of(model).records[_NAME].draft, head))

    def _filled(self, method: Method, model: nn.Module) -> Method:
        """Short names spelt out; a classifier's new head trained in full, as `lorakit train` does."""
        if isinstance(method, Several):
            method = Several(tuple(spelt_out(one, model) if isinstance(one, LoRA) else one for one in method.methods))
        elif isinstance(method, LoRA):
            method = spelt_out(method, model)
        return with_head(method, output_head(model)) if self.work.task in NEW_HEADS else method

    def _traced(self, method: Method | str, sizes: _Sizes) -> Traced | None:
        """The step's memory and FLOPs; None, with a note, where the model cannot be followed."""
        try:
            return self._continued(method, sizes) or trace(self.model, self.work)
        except AdapterError as error:  # a method that computes no next tokens, as WARP
            self.notes.append(f"memory and FLOPs of {_in_words(method)} are unknown: {error}")
            return None
        except LorakitError:
            raise
        except Exception as error:  # a forward pass that needs values raises whatever it likes
            text = " ".join(str(error).split())[:200]
            self.notes.append(
                f"memory and FLOPs are unknown: {type(self.model).__name__}'s training step cannot be followed without values "
                f"({type(error).__name__}: {text})."
            )
            return None

    def _continued(self, method: Method | str, sizes: _Sizes) -> Traced | None:
        if not self.short:
            return None

        def at(depth: int) -> tuple[Traced, int]:
            with self._on(self.short[depth], method) as part:
                return trace(self.short[depth], self.work), part.total + part.trainable

        try:
            return continued(self.depth, at, sizes.total + sizes.trainable)
        except TargetError:  # a method that names layers by number does not fit a shorter model
            return None


def _over(traced: Traced | None, full: Row | None) -> float | None:
    if traced is None:
        return None
    if full is None:
        return 1.0
    return traced.flops / full.flops if full.flops else None


def _in_words(method: Method | str) -> str:
    """ "LoRA r=4 on q, v"; another method by its class and what of it is no default."""
    if not isinstance(method, Method):
        return "full fine-tuning"
    if isinstance(method, Several):
        return " + ".join(map(_in_words, method.methods))
    if not isinstance(method, LoRA):
        values = [(one.name, getattr(method, one.name), one.default) for one in fields(method)]  # type: ignore[arg-type]
        said = [f"{key}={value}" for key, value, default in values if value != default and key != "modules_to_save"]
        return " ".join([type(method).__name__, *said])
    where = method.target_modules
    return f"LoRA r={method.r} on {where if isinstance(where, str) else ', '.join(where)}"


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
