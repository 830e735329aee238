"""One training step on the meta device: every allocation is seen, nothing is allocated, nothing is computed.

No list of what each layer saves is kept here: the model, the adapters and lorakit's own loss and autograd functions run as
in training, and each new storage counts until it is freed. Two operations are stood in for, because PyTorch computes them
otherwise on the meta device than where training runs: attention and dropout.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config as fake_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lorakit.core import cross_entropy
from lorakit.core import dropout as core_dropout
from lorakit.errors import UsageError
from lorakit.models import longest_row
from lorakit.train.base_dropout import BaseDropout
from lorakit.train.loss import objective_for


@dataclass(frozen=True)
class Work:
    """What a step runs on. device: "cuda" or "cpu": of a dropout one keeps a byte an entry, the other the numbers of those that
    go (see lorakit.train.base_dropout)."""

    batch: int
    length: int
    task: str
    checkpointing: bool
    device: str


@dataclass(frozen=True)
class Traced:
    """Bytes beside weights and optimizer state, and FLOPs, of one forward and backward pass.

    saved: what stands when the forward pass ends. first, second: the most at a time from the start to the middle of the
    backward pass, and from there to its end (gradients included, which grow as what was saved is freed).
    """

    saved: int
    first: int
    second: int
    flops: int


def trace(model: nn.Module, work: Work) -> Traced:
    """Run one step of `model`, whose parameters are on the meta device. Raises whatever a forward pass raises there that
    needs values (a model that branches on its data)."""
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    batch, meter = batch_for(model, work), Meter(model)
    own = BaseDropout(model).drawing() if work.device == "cpu" else nullcontext()
    with own, _as_in_training(work.device, meter):
        loss = objective_for(work.task).loss(model, batch).total
        saved, start = meter.now, len(meter.course)
        torch.autograd.backward(loss / work.batch)
    middle = start + (len(meter.course) - start) // 2
    return Traced(saved, max(meter.course[:middle]), max(meter.course[middle:]), meter.flops)


def batch_for(model: nn.Module, work: Work) -> dict[str, Tensor]:
    """Rows without padding, every position a target. Raises UsageError where the model takes no row so long."""
    rows, labels = work.batch, torch.empty(work.batch, dtype=torch.int64, device="meta")
    config: Any = model.config
    if work.task == "image-classification":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        dtype = next(model.parameters()).dtype
        return {
            "pixel_values": torch.empty(rows, config.num_channels, size, size, dtype=dtype, device="meta"),
            "labels": labels,
        }
    longest = longest_row(model, SimpleNamespace(model_max_length=10**9))
    if longest is not None and work.length > longest:
        raise UsageError(f"length {work.length} is more than the {longest} tokens that the model takes in a row.")
    ids = torch.empty(rows, work.length, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "labels": labels if work.task == "sequence-classification" else torch.empty_like(ids)}


class Meter(TorchDispatchMode):
    """Counts live bytes after each operation, the model's own tensors aside, and FLOPs (as torch's FlopCounterMode).

    A question that needs values (`mask.all()`) is answered with yes: no padding, nothing packed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now, self.flops = 0, 0
        self.course: list[int] = [0]
        self._live: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            self._live[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype is torch.bool:
            return True
        out = func(*args, **kwargs)
        flops = _FLOPS.get(func._overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._watch(leaf.untyped_storage())
        self.course.append(self.now)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def freed(_: Any) -> None:
            del self._live[key]
            self.now -= size

        self._live[key] = weakref.ref(storage, freed)
        self.now += size


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],  # in place, as lorakit adds its low-rank products
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}


class Attention(torch.autograd.Function):
    """Fused attention's memory: q, k, v, the output and one number a query are kept, no matrix of scores (FlashAttention-2,
    arXiv 2307.08691; PyTorch's CPU kernel keeps the same). q, k, v: (batch, heads, seq, width)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: Meter) -> Tensor:
        rows, heads, seq, _ = q.shape
        out = q.new_empty(rows, seq, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, seq, dtype=torch.float32))
        ctx.meter = meter
        meter.flops += sdpa_flop_count(q.shape, _repeated(k, heads), _repeated(v, heads))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        keys, values = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        ctx.meter.flops += sdpa_backward_flop_count(grad.shape, q.shape, keys, values)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _repeated(x: Tensor, heads: int) -> tuple[int, ...]:
    """The shape of keys or values that several queries' heads share, once each has its own."""
    return (x.shape[0], heads, *x.shape[2:])


@contextmanager
def _as_in_training(device: str, meter: Meter) -> Iterator[None]:
    """Stand in for what PyTorch does otherwise on the meta device; tensors elsewhere (other threads') go on as before."""
    functional = nn.functional
    fused, drop = functional.scaled_dot_product_attention, functional.dropout

    def attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        dropped = options.get("dropout_p", more[1] if len(more) > 1 else 0.0)
        if not query.is_meta or (dropped and device == "cpu"):  # the CPU's fused kernel has no dropout
            return fused(query, key, value, *more, **options)
        out: Tensor = Attention.apply(query, key, value, meter)  # type: ignore[no-untyped-call]
        return out

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not input.is_meta or device == "cpu" or not (training and p):
            return drop(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]  # a mask of one byte an entry

    with ExitStack() as stack:
        stack.enter_context(_ONE)
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(functional, "dropout", dropout))
        stack.enter_context(mock.patch.object(fake_config, "meta_nonzero_assume_all_nonzero", True))
        if device != "cpu":  # no dropout by the numbers of what goes, no vocabulary in pieces
            stack.enter_context(mock.patch.object(core_dropout, "FEW", 0.0))
            stack.enter_context(mock.patch.object(cross_entropy, "PIECE", 2**62))
        stack.enter_context(meter)
        yield


_ONE = threading.Lock()  # a stand-in of one trace must not outlive another's
