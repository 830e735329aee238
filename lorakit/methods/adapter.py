"""What all adapters are that compute a residual on a layer's output: the operation, fresh tensors, the common fields."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import low_rank_kind
from lorakit.attach.method import Draft, Insert, Method
from lorakit.attach.operation import Operation, Share
from lorakit.attach.quantized import dense_dtype
from lorakit.errors import UsageError
from lorakit.methods.body import check_length
from lorakit.methods.kept import check_kept, keep
from lorakit.methods.projections import Projections, check_projections, find_projections

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
START = 0.01
"""Standard deviation of a fresh down-projection (Houlsby et al. 2019, section 3.6: 1e-2, near the identity)."""


@dataclass(frozen=True)
class Residual(Operation):
    """`y + strength * delta(x, y)` with y the module's output and x its input, on the rows that are the adapter's."""

    by_token: ClassVar[bool] = True

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        tensors: Mapping[str, Tensor],
        share: Share,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        out = call(*args, **kwargs)
        if share.strength == 0.0:
            return out
        y = out[0] if isinstance(out, tuple) else out  # a block may give its states first of several
        x = args[0] if args else next(iter(kwargs.values()))
        changed = self._changed(x, y, tensors, share)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    def _changed(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], share: Share) -> Tensor:
        if share.route is None:
            return y + share.strength * self.delta(x, y, tensors).to(y.dtype)
        flat = y.reshape(-1, y.shape[-1])
        rows = share.rows(y.shape[0], flat.shape[0], y.device)
        if rows is None or not rows.numel():
            return y
        delta = self.delta(x.reshape(-1, x.shape[-1])[rows], flat[rows], tensors)
        return flat.index_add(0, rows, share.strength * delta.to(y.dtype)).view(y.shape)

    @abstractmethod
    def delta(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What is added. x: (..., in); y: (..., out); the result as y."""


@dataclass(frozen=True)
class Bottleneck(Residual):
    """`f(norm(y) Wd^T + bd) Wu^T + bu`. Wd: (r, d); Wu: (d, r); norm: a LayerNorm with tensors of its own, or none."""

    activation: str
    eps: float | None = None
    """Of the LayerNorm; None = there is none."""

    def delta(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        t = {
            name: tensor.to(y.dtype) for name, tensor in tensors.items()
        }  # cast, as LoRA's factors are: they are small
        h = y
        if self.eps is not None:
            h = nn.functional.layer_norm(h, h.shape[-1:], t["norm_weight"], t["norm_bias"], self.eps)
        h = ACTIVATIONS[self.activation](nn.functional.linear(h, t["down_weight"], t["down_bias"]))
        return nn.functional.linear(h, t["up_weight"], t["up_bias"])


class Fresh:
    """Makes an adapter's first tensors beside a layer: drawn on the CPU, so that a seed gives the same on every device."""

    def __init__(self, dtype: torch.dtype | None, generator: torch.Generator | None) -> None:
        self.dtype, self.generator = dtype, generator

    def normal(self, beside: Tensor, *shape: int, std: float = START) -> Tensor:
        """From N(0, std^2)."""
        like = self._like(beside)
        if beside.device.type == "meta":
            return torch.empty(shape, dtype=like, device="meta")
        values = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(std=std, generator=self.generator)
        return values.to(device=beside.device, dtype=like)

    def full(self, beside: Tensor, *shape: int, value: float = 0.0) -> Tensor:
        """Filled with one value, by default zero."""
        return torch.full(shape, value, dtype=self._like(beside), device=beside.device)

    def _like(self, beside: Tensor) -> torch.dtype:
        return self.dtype or dense_dtype(beside)

    def bottleneck(self, beside: Tensor, d: int, r: int, *, norm: bool = False) -> dict[str, Tensor]:
        """Tensors of `Bottleneck`; Wu and both biases are zero, so that a fresh adapter adds nothing.

        beside: the weight whose device and dtype they take.
        """
        tensors = {"norm_weight": self.full(beside, d, value=1.0), "norm_bias": self.full(beside, d)} if norm else {}
        return tensors | {
            "down_weight": self.normal(beside, r, d),
            "down_bias": self.full(beside, r),
            "up_weight": self.full(beside, d, r),
            "up_bias": self.full(beside, d),
        }


def weight_of(model: nn.Module, path: str) -> tuple[Tensor, int, int]:
    """(weight, in, out) of a linear layer that an adapter stands beside."""
    leaf = model.get_submodule(path)
    kind, weight = low_rank_kind(plain(type(leaf))), leaf._parameters["weight"]
    if kind is None or weight is None:
        raise UsageError(f"{path} ({type(leaf).__name__}) has no weight beside which an adapter could stand.")
    return (weight, *kind.shape(leaf))


@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """The fields of all bottleneck adapters: `y + f(y Wd^T + bd) Wu^T + bu`, 2 d r + r + d numbers each."""

    learning_rate: ClassVar[float] = 3.0e-4  # Hu et al. 2021, table 9
    eps: ClassVar[float | None] = None  # of a LayerNorm of the adapter's own, where it has one

    r: int = 64
    """Width of the bottleneck."""
    activation: str = "relu"
    """relu, gelu, silu, tanh or identity."""
    attention: str | Sequence[str] | None = None
    """Names of the attentions' output projections, one in each block; None = the model family's own."""
    mlp: str | Sequence[str] | None = None
    """Names of the feed-forward parts' output projections, likewise."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        check_width(self.r)
        check_activation(self.activation)
        check_projections(self.attention, self.mlp)
        check_kept(self.modules_to_save)

    @abstractmethod
    def sites(self, places: Projections) -> Sequence[str]:
        """The modules of one block (or the block itself) whose outputs take an adapter; all are as wide as the model."""

    def blocks(self, places: Sequence[Projections]) -> Sequence[Projections]:
        """The blocks that have adapters."""
        return places

    def places(self, model: nn.Module) -> list[Projections]:
        """Where adapters of this kind can go in `model`. Raises TargetError where that is not known."""
        return find_projections(model, self.attention, self.mlp)

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        fresh, draft = Fresh(dtype, generator), Draft()
        operation = Bottleneck(self.activation, self.eps)
        for block in self.blocks(self.places(model)):
            weight, _, d = weight_of(model, block.mlp)
            for path in self.sites(block):
                tensors = fresh.bottleneck(weight, d, self.r, norm=self.eps is not None)
                draft.inserts[path] = {"adapter": Insert(operation, tensors)}
        return keep(draft, model, self.modules_to_save)


def check_width(r: object) -> None:
    check_length("r", r)


def check_activation(activation: object) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UsageError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
