"""The root-mean-square norms beside the adapted layers, computed in one autograd node while gradients are recorded.

A module's class is swapped for one whose forward is the fused function, where its source is the form that transformers
writes (Llama, Mistral, Qwen, ...) and the very same comes out; everywhere else it runs its own forward.
"""

import ast
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.feedforward import stand_in
from lorakit.attach.reading import forward_of, steps
from lorakit.core import kernels
from lorakit.core.norm import RootMeanSquareNorm

FORM = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""


def fuse_norm(module: nn.Module) -> bool:
    """Swap the module's class where its form is known; whether it was."""
    cls: Any = type(module)
    if plain(cls) is not cls or "forward" in module.__dict__ or not known(cls):
        return False
    module.__class__ = _fused(cls)
    return True


@cache
def known(cls: Any) -> bool:
    """Whether `cls.forward` is FORM."""
    function, form = forward_of(cls), ast.parse(FORM).body[0]
    return function is not None and [*map(ast.dump, steps(function))] == [*map(ast.dump, form.body)]  # type: ignore[attr-defined]


@cache
def _fused(base: Any) -> type[nn.Module]:
    return stand_in(base, _forward_of(base), _rebuild)


def _forward_of(base: type[nn.Module]) -> Callable[..., Any]:
    base_forward = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x, weight = args[0], self._parameters["weight"]
            if kernels.fused and weight is not None and _same(x, weight):
                return RootMeanSquareNorm.apply(x, weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return base_forward(self, *args, **kwargs)

    return forward


def _same(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused function computes what the module would: in float32, with a weight that is not trained."""
    return (
        x.requires_grad
        and x.dtype == weight.dtype == torch.float32
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and x.device == weight.device
    )


def _rebuild(base: Any) -> nn.Module:
    cls: Any = _fused(base)
    module: nn.Module = cls.__new__(cls)
    return module
