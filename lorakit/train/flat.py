"""What is trained in one buffer: one norm, one update and one copy a step in place of one for each of some hundred tensors.

An adapter's tensors are small, and a step over 150 of them one by one costs more in calls than in arithmetic. Here their
values, and their gradients, are views of one flat tensor for each learning rate; the parameters stay the same objects.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lorakit.errors import UsageError

ALIGN = 256
"""Elements: each tensor begins at a multiple, so that no block of an 8-bit optimizer's state holds two tensors."""
EPSILON = 1e-6
"""Added to the norm before dividing by it, as torch's clip_grad_norm_ does."""
LARGEST = 2**20
"""Elements of a tensor that still goes into the buffer; a call for each larger one costs nothing beside its arithmetic."""


@dataclass
class _Placed:
    """One parameter and its part of a buffer."""

    parameter: nn.Parameter
    value: Tensor
    grad: Tensor


class FlatParameters:
    """Trained parameters, in flat buffers while `bind` holds (from the first use to `release`).

    held: what optimizer, clipping and copies work on: a flat parameter for each learning rate, type and device, then those
    that stay apart: large ones, and any whose storage is not its own, dense and contiguous (tied, sharded, quantised).
    groups: the same as an optimizer takes them, "ratio" being a group's learning rate over the run's.
    A parameter in a buffer that gets no gradient in a step counts as one whose gradient is zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rates: Mapping[int, float]) -> None:
        """rates: id of a parameter -> factor on its learning rate; 1 for those not named."""
        self.parameters = list(dict.fromkeys(parameters))
        self.bound = False
        self._placed: list[_Placed] = []
        self._flat: list[nn.Parameter] = []
        loose = _loose(self.parameters)
        together: dict[tuple[float, torch.dtype, torch.device], list[nn.Parameter]] = {}
        ratios: list[float] = []
        for one in self.parameters:
            if one not in loose:
                together.setdefault((rates.get(id(one), 1.0), one.dtype, one.device), []).append(one)
        for (ratio, _, _), members in together.items():
            self._flat.append(self._buffer(members))
            ratios.append(ratio)
        apart = [one for one in self.parameters if one in loose]
        self.held = [*self._flat, *apart]
        ratios += [rates.get(id(one), 1.0) for one in apart]
        self.groups: list[dict[str, object]] = [
            {"params": [one for one, own in zip(self.held, ratios, strict=True) if own == ratio], "ratio": ratio}
            for ratio in dict.fromkeys(ratios)
        ]
        self.bind()

    def _buffer(self, members: Sequence[nn.Parameter]) -> nn.Parameter:
        sizes = [-(-one.numel() // ALIGN) * ALIGN for one in members]
        flat = nn.Parameter(torch.zeros(sum(sizes), dtype=members[0].dtype, device=members[0].device))
        flat.grad = torch.zeros_like(flat)
        begin = 0
        for one, size in zip(members, sizes, strict=True):
            part = slice(begin, begin + one.numel())
            self._placed.append(_Placed(one, flat.data[part].view(one.shape), flat.grad[part].view(one.shape)))
            begin += size
        return flat

    def bind(self) -> None:
        """Have the parameters be views of the buffers, with the values that they hold now. Raises UsageError, see gather."""
        for placed in self._placed:
            _bring(placed)
            placed.parameter.grad = placed.grad
        self.bound = True

    def gather(self) -> None:
        """After a backward pass: whatever gradient or value is no longer in its buffer (set by others) is brought there.

        Raises UsageError where a parameter has been moved to another device or type since.
        """
        for placed in self._placed:
            parameter = placed.parameter
            grad = parameter.grad
            if grad is not placed.grad:
                if grad is None:
                    placed.grad.zero_()
                else:
                    placed.grad.copy_(grad)
                parameter.grad = placed.grad
            if parameter.data_ptr() != placed.value.data_ptr():
                _bring(placed)

    def updated(self) -> None:
        """After an update: gradients to zero; whoever looks at a parameter's version sees that it has changed."""
        self._clear()
        increment_version([placed.parameter for placed in self._placed])

    def _clear(self) -> None:
        for flat in self._flat:
            flat.grad.zero_()  # type: ignore[union-attr]
        for one in self.held[len(self._flat) :]:
            one.grad = None

    def clip(self, most: float | None) -> float:
        """The norm of all gradients together, which are scaled down to `most` where it is above (None = never).

        As torch's clip_grad_norm_, but summed by blocks: float32 loses four digits over millions of entries in a row.
        """
        grads = [one.grad for one in self.held if one.grad is not None]
        if not grads:
            return 0.0
        norms = torch.stack([_norm(grad).to(grads[0].device) for grad in grads])
        norm = float(torch.linalg.vector_norm(norms))
        if most is not None and math.isfinite(norm) and norm + EPSILON > most:
            torch._foreach_mul_(grads, most / (norm + EPSILON))
        return norm

    def copy(self) -> list[Tensor]:
        """The values of `held`."""
        return [one.detach().clone() for one in self.held]

    @torch.no_grad()
    def copy_to(self, kept: Sequence[Tensor]) -> None:
        """Write the values of `held` over a former copy."""
        for into, one in zip(kept, self.held, strict=True):
            into.copy_(one)

    def restore(self, kept: Sequence[Tensor]) -> None:
        """Put copied values back."""
        for one, value in zip(self.held, kept, strict=True):
            one.data.copy_(value)
        increment_version([placed.parameter for placed in self._placed])

    def release(self) -> None:
        """Give every parameter a storage of its own again, and no gradient. `bind` takes them in again."""
        for placed in self._placed:
            if placed.parameter.data_ptr() == placed.value.data_ptr():
                placed.parameter.data = placed.value.clone()
        for one in self.parameters:
            one.grad = None
        self._clear()
        self.bound = False


def _norm(grad: Tensor) -> Tensor:
    """A gradient's norm in float32 at least; of a buffer, block by block first."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.dim() == 1 and grad.numel() % ALIGN == 0:
        grad = torch.linalg.vector_norm(grad.view(-1, ALIGN), dim=1, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=dtype)
    return norm


def _bring(placed: _Placed) -> None:
    parameter, value = placed.parameter, placed.value
    if parameter.device != value.device or parameter.dtype != value.dtype:
        raise UsageError(
            f"a trained tensor was {value.dtype} on {value.device} and is {parameter.dtype} on {parameter.device} now: the "
            "model was moved or cast while it was trained. Move it before training begins."
        )
    if parameter.data_ptr() != value.data_ptr():
        value.copy_(parameter.data)
        parameter.data = value


def _loose(parameters: Sequence[nn.Parameter]) -> set[nn.Parameter]:
    """Those that do not go into a buffer."""
    shared: dict[int, int] = {}
    plain = [one for one in parameters if type(one.data) is Tensor and type(one) is nn.Parameter]
    for one in plain:
        shared[one.untyped_storage().data_ptr()] = shared.get(one.untyped_storage().data_ptr(), 0) + 1
    fitting = {
        one
        for one in plain
        if one.is_floating_point()
        and one.is_contiguous()
        and 0 < one.numel() <= LARGEST
        and one.device.type != "meta"
        and shared[one.untyped_storage().data_ptr()] == 1
        and one.untyped_storage().nbytes() == one.numel() * one.element_size()
    }
    return set(parameters) - fitting
