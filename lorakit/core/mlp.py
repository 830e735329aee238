"""The feed-forward part of a block with three (or two) adapted linear layers as one autograd node.

Gated (Llama): `y = D(act(G(x)) * U(x))`; plain (GPT-2): `y = D(act(U(x)))`. Backward computes the activation anew from
G's and U's outputs, so that neither it nor D's input is kept, and the tanh form of GELU is one pass instead of eight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.autograd import check_epoch
from lorakit.core.dropout import draw, without, zeroed_
from lorakit.core.siblings import Member, Setting, a_gradients, flattened, gradients_of, outputs_of

ROWS = 256  # tokens whose gating goes backward at once: what five passes share then stays in a cache


class Activation(NamedTuple):
    """forward: a -> act(a). backward: (d act, a, out) -> da, in out."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    def backward(grad: Tensor, a: Tensor, out: Tensor) -> Tensor:
        da: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, a, approximate=approximate, grad_input=out)
        return da

    return Activation(lambda a: torch.nn.functional.gelu(a, approximate=approximate), backward)


def _silu_backward(grad: Tensor, a: Tensor, out: Tensor) -> Tensor:
    da: Tensor = torch.ops.aten.silu_backward.grad_input(grad, a, grad_input=out)
    return da


ACTIVATIONS = {
    "silu": Activation(torch.nn.functional.silu, _silu_backward),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def low_rank_mlp(
    x: Tensor, inner: list[Member], outer: Member, activation: str, mark: Tensor, epoch: int, dropout: float = 0.0
) -> Tensor:
    """D(act(G(x)) * U(x)) for inner = [G, U], D(act(U(x))) for inner = [U]. x: (..., in) -> (..., out).

    dropout: of the low-rank products' inputs, the one that G and U share and D's; 0 outside training.
    """
    settings, tensors = flattened([*inner, outer])
    return LowRankMLP.apply(x, settings, activation, dropout, mark, epoch, *tensors)  # type: ignore[no-any-return,no-untyped-call]


class LowRankMLP(torch.autograd.Function):
    """See the module and low_rank_mlp."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        settings: tuple[Setting, ...],
        activation: str,
        dropout: float,
        mark: Tensor,
        epoch: int,
        *tensors: Any,
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
        drawn_x, factor = draw(x2, dropout) if dropout else (None, 1.0)
        hidden, xa_t = outputs_of(x2, settings[:-1], tensors[:-4], drawn_x, factor)  # (tokens, inner) each
        h = ACTIVATIONS[activation].forward(hidden[0])
        if len(hidden) == 2:
            h.mul_(hidden[1])
        drawn_h = draw(h, dropout)[0] if dropout else None
        (y,), ha_t = outputs_of(h, settings[-1:], tensors[-4:], drawn_h, factor, last=True)
        ctx.save_for_backward(x, xa_t, ha_t, drawn_x, drawn_h, mark, *hidden, *tensors)
        ctx.settings, ctx.activation, ctx.factor, ctx.epoch = settings, activation, factor, epoch
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa_t, ha_t, drawn_x, drawn_h, mark, *rest = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        n, settings, factor = len(ctx.settings) - 1, ctx.settings, ctx.factor
        hidden, tensors = rest[:n], rest[n:]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dh, dyb_t, outer = gradients_of(
            [dy2], ha_t, settings[-1:], tensors[-4:], drawn_h, factor, True, needs[-4:]
        )  # dh: (tokens, inner)
        h, das = _activated(ACTIVATIONS[ctx.activation], hidden, dh)
        if needs[-2]:
            outer[2::4] = a_gradients(dyb_t, h if drawn_h is None else zeroed_(h, drawn_h), tensors[-4:])
        del h
        dx, dyb_t, inner = gradients_of(das, xa_t, settings[:-1], tensors[:-4], drawn_x, factor, need_x, needs[:-4])
        if any(needs[2:-4:4]):
            inner[2::4] = a_gradients(dyb_t, without(x2, drawn_x), tensors[:-4])
        return None if dx is None else dx.view(x.shape), None, None, None, None, None, *inner, *outer


def _activated(act: Activation, hidden: list[Tensor], dh: Any) -> tuple[Tensor, list[Tensor]]:
    """(h, the gradients of the tensors in `hidden`) from that of h, which is overwritten."""
    if len(hidden) == 1:
        return act.forward(hidden[0]), [act.backward(dh, hidden[0], torch.empty_like(dh))]
    h, da = torch.empty_like(dh), torch.empty_like(dh)
    for start in range(0, len(dh), ROWS):
        rows = slice(start, start + ROWS)
        gate, up, grad = hidden[0][rows], hidden[1][rows], dh[rows]
        first = act.forward(gate)
        torch.mul(first, up, out=h[rows])
        act.backward(grad * up, gate, da[rows])
        grad.mul_(first)
    return h, [da, dh]
