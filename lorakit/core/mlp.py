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
from lorakit.core.gemm import base_gradient, base_product, product
from lorakit.core.siblings import Member, Setting, flattened


class Activation(NamedTuple):
    """forward: a -> act(a). backward: (d act, a) -> da."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda a: torch.nn.functional.gelu(a, approximate=approximate),
        lambda grad, a: torch.ops.aten.gelu_backward(grad, a, approximate=approximate),
    )


ACTIVATIONS = {
    "silu": Activation(torch.nn.functional.silu, lambda grad, a: torch.ops.aten.silu_backward(grad, a)),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def low_rank_mlp(x: Tensor, inner: list[Member], outer: Member, activation: str, mark: Tensor, epoch: int) -> Tensor:
    """D(act(G(x)) * U(x)) for inner = [G, U], D(act(U(x))) for inner = [U]. x: (..., in) -> (..., out)."""
    settings, tensors = flattened([*inner, outer])
    return LowRankMLP.apply(x, settings, activation, mark, epoch, *tensors)  # type: ignore[no-any-return,no-untyped-call]


class LowRankMLP(torch.autograd.Function):
    """See the module and low_rank_mlp."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        settings: tuple[Setting, ...],
        activation: str,
        mark: Tensor,
        epoch: int,
        *tensors: Any,
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
        hidden, xas = [], []
        for i, setting in enumerate(settings[:-1]):
            a, xa_t = _adapted(x2, tensors[4 * i : 4 * i + 4], *setting)
            hidden.append(a)  # (tokens, inner)
            xas.append(xa_t)  # (r, tokens)
        h = _product_of(hidden, activation)
        y, ha_t = _adapted(h, tensors[-4:], *settings[-1])
        ctx.save_for_backward(x, ha_t, mark, *hidden, *xas, *tensors)
        ctx.settings, ctx.activation, ctx.epoch = settings, activation, epoch
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ha_t, mark, *rest = ctx.saved_tensors
        check_epoch(mark, ctx.epoch)
        n, settings = len(ctx.settings) - 1, ctx.settings
        hidden, xas, tensors = rest[:n], rest[n : 2 * n], rest[2 * n :]
        x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        act = ACTIVATIONS[ctx.activation]
        first = act.forward(hidden[0])
        h = first * hidden[1] if n == 2 else first
        dh, outer = _gradients(dy2, h, ha_t, tensors[-4:], settings[-1], None, ctx.needs_input_grad[-3:])
        del h
        inner: list[Tensor | None] = []
        if n == 2:
            das = [act.backward(dh * hidden[1], hidden[0]), dh.mul_(first)]
        else:
            das = [act.backward(dh, hidden[0])]
        del first
        dx: Tensor | None = None
        for i, da in enumerate(das):
            needs = ctx.needs_input_grad[5 + 4 * i + 1 : 5 + 4 * i + 4]
            want = ctx.needs_input_grad[0]
            own = tensors[4 * i : 4 * i + 4]
            dx, found = _gradients(da, x2, xas[i], own, settings[i], dx, needs, want)
            inner += found
        return None if dx is None else dx.view(x.shape), None, None, None, None, *inner, *outer


def _adapted(x2: Tensor, tensors: Any, scale: float, transposed: bool, exact: bool) -> tuple[Tensor, Tensor]:
    """(the layer's output, A x) on x2: (tokens, in)."""
    weight, bias, A, Bt = tensors
    y = base_product(x2, weight, bias, transposed, exact)
    xa_t = product(A, x2)  # (r, tokens)
    return y.addmm_(xa_t.t(), Bt, alpha=scale), xa_t


def _product_of(hidden: list[Tensor], activation: str) -> Tensor:
    h = ACTIVATIONS[activation].forward(hidden[0])
    return h.mul_(hidden[1]) if len(hidden) == 2 else h


def _gradients(
    dy: Tensor,
    x2: Tensor,
    xa_t: Tensor,
    tensors: Any,
    setting: Setting,
    dx: Tensor | None,
    needs: tuple[bool, ...],
    want_dx: bool = True,
) -> tuple[Any, list[Tensor | None]]:
    """(dx, [None, dbias, dA, dBt]) of one layer. dx: what other layers of the same input added to its gradient."""
    weight, _, A, Bt = tensors
    scale, transposed, _ = setting
    dyb_t = product(Bt, dy).mul_(scale)  # (r, tokens)
    if want_dx:
        dx = base_gradient(dy, weight, transposed, dx).addmm_(dyb_t.t(), A)
    need_bias, need_a, need_b = needs
    return dx, [
        None,
        dy.sum(0) if need_bias else None,
        product(dyb_t, x2.t()) if need_a else None,
        product(xa_t, dy.t()).mul_(scale) if need_b else None,
    ]
