"""A feed-forward module whose linear layers are all adapted, computed as one autograd node in training.

The module's class is swapped for a cached subclass of the same name, as an adapted leaf's is, where its forward is of a
known form (lorakit.attach.reading). It looks at each call whether the fused function computes what the module would:
else it runs the module's own forward. The tanh form of GELU as transformers writes it in Python (GPT-2) is replaced only
in training mode, since the fused one differs in the last bit.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import attend, plain
from lorakit.attach.kinds import LinearKind, low_rank_kind, qualified
from lorakit.attach.reading import Feedforward, feedforward
from lorakit.core import kernels
from lorakit.core.mlp import low_rank_mlp

SAME = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
}
IN_TRAINING = {"transformers.activations.NewGELUActivation": "gelu_tanh"}  # equal to rounding


def feed(module: nn.Module) -> bool:
    """Swap the module's class where its form is known; whether it was."""
    cls: Any = type(module)
    if plain(cls) is not cls or "forward" in module.__dict__ or feedforward(cls) is None:
        return False
    module.__class__ = _fed(cls)
    return True


def starve(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = plain(type(module))


@cache
def _fed(base: Any) -> type[nn.Module]:
    return stand_in(base, _forward_of(base, feedforward(base)), _rebuild)  # type: ignore[arg-type]


def stand_in(base: Any, forward: Callable[..., Any], rebuild: Callable[[Any], nn.Module]) -> type[nn.Module]:
    """A subclass of the same name with another forward. rebuild: makes an empty module of it from `base`, for copies and
    pickles, which cannot name a class that is made at run time."""

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return rebuild, (base,), self.__getstate__()  # type: ignore[no-untyped-call]

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_lk_base": base,
        "forward": forward,
    }
    return type(base.__name__, (base,), body)


def _forward_of(base: type[nn.Module], form: Feedforward) -> Callable[..., Any]:
    base_forward = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Without gradients too in training: a reentrant checkpoint's first pass must draw what its recompute draws.
        if kernels.fused and (torch.is_grad_enabled() or self.training) and len(args) == 1 and not kwargs:
            y = None if torch.compiler.is_compiling() else _fused(self, form, args[0])
            if y is not None:
                return y
        return base_forward(self, *args, **kwargs)

    return forward


def _fused(module: nn.Module, form: Feedforward, x: Tensor) -> Tensor | None:
    """The module's output; None where the fused function does not compute the very same."""
    children = module._modules
    activation = _activation(children.get(form.activation), module.training)
    leaves = [children.get(name) for name in (form.gate, form.up, form.down) if name is not None]
    kind = None if leaves[0] is None else low_rank_kind(type(leaves[0]))
    if activation is None or not isinstance(kind, LinearKind):
        return None
    members, dropouts = [], set()
    for leaf in leaves:
        if leaf is None or low_rank_kind(type(leaf)) is not kind or not _ready(leaf, kind, x):
            return None
        members.append(kind.member(leaf, x.dtype))
        dropouts.add(kind.dropout(leaf))
    if len(dropouts) > 1 or not (torch.is_grad_enabled() or any(dropouts)):
        return None
    for leaf in leaves:
        attend(leaf._lk_site)  # type: ignore[union-attr,arg-type]
    site: Any = leaves[-1]._lk_site  # type: ignore[union-attr]
    y = low_rank_mlp(x, members[:-1], members[-1], activation, site.mark, site.epoch, dropouts.pop())
    dropout = None if form.dropout is None else children[form.dropout]
    return y if dropout is None else dropout(y)


def _ready(leaf: nn.Module, kind: LinearKind, x: Tensor) -> bool:
    """Whether a leaf is adapted by one plain pair, and nobody listens to its own forward."""
    site: Any = leaf.__dict__.get("_lk_site")
    low = None if site is None else kind.only_pair(site)
    heard = leaf._forward_hooks or leaf._forward_pre_hooks or leaf._backward_hooks or leaf._backward_pre_hooks
    if low is None or site.inserts:
        return False
    return not heard and kind.fusable(leaf, site, x)


def _activation(module: nn.Module | None, training: bool) -> str | None:
    if module is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    name = qualified(type(module))
    if name == "torch.nn.modules.activation.GELU":
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return SAME.get(name) or (IN_TRAINING.get(name) if training else None)


def _rebuild(base: Any) -> nn.Module:
    cls: Any = _fed(base)
    module: nn.Module = cls.__new__(cls)
    return module
