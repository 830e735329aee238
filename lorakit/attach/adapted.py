"""The class of an adapted leaf: a cached subclass of its own class, of the same name, that looks at the leaf's site.

`leaf.__class__ = adapted(type(leaf))` renames nothing, adds no child module and no hook, and costs under a microsecond
while no adapter is on; `leaf.__class__ = plain(type(leaf))` undoes it. Copies and pickles rebuild from the plain class.
"""

from collections.abc import Callable
from functools import cache, partial
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import nn

from lorakit.attach.kinds import is_stock, row_kind
from lorakit.attach.operation import Share
from lorakit.attach.site import Site, replacement, this_thread
from lorakit.errors import AdapterError

is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def plain(cls: type) -> type:
    """The class that an adapted class was made from (itself where it is not adapted)."""
    base: type = cls.__dict__.get("_lk_base", cls)
    return base


@cache
def adapted(base: Any, replaced: frozenset[str] = frozenset()) -> type[nn.Module]:
    """The adapted class of `base`. replaced: names of parameters for which an adapter's own tensor may stand."""
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_lk_base": base,
        "_lk_replaced": replaced,
        "_lk_stock": is_stock(base),
        "forward": _forward_of(base),
    }
    body.update({name: _stand_in(name) for name in replaced})
    return type(base.__name__, (base,), body)


def attend(site: Site) -> None:
    """Have the site notice a forward, where it could be a checkpoint's recompute with another adapter."""
    if site.seen != site.epoch or site.thread != get_ident() or (site.epoch > 1 and is_grad_enabled()):
        site.notice()


def _forward_of(base: type[nn.Module]) -> Callable[..., Any]:
    kind, base_forward = row_kind(base), base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site: Site = self._lk_site  # type: ignore[assignment]
        ready = site.ready
        if ready is not None and not is_compiling() and not is_grad_enabled() and ready.fits(args, kwargs):
            return ready.add_(self, base_forward(self, *args), *args)
        if not is_compiling():
            attend(site)
        inner = site.inner
        if not site.active or (site.route is not None and site.route.idle and not is_grad_enabled()):
            return base_forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        call = partial(base_forward, self) if inner is None else inner
        if site.inserts:
            return _around(self, site, partial(own, self, site, call))(*args, **kwargs)
        return own(self, site, call, *args, **kwargs)

    def own(self: nn.Module, site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The leaf with what its adapters change in it, before what they compute around it."""
        if kind is not None:
            if not args and kwargs:  # the one input of these layers, given by its name
                args = (kwargs.pop(next(iter(kwargs))),)
            return kind.forward(self, site, call, *args, **kwargs)
        if site.route is not None and any(slot.own for slot in site.active):
            raise AdapterError(
                f"{site.path} ({type(self).__name__}) has parameters of its own in an adapter (a bias, a head, experts), "
                "and rows of one batch cannot take different ones there. Run one adapter at a time with lorakit.use."
            )
        return _keeping(site, call, args, kwargs)

    forward.__wrapped__ = base_forward  # type: ignore[attr-defined]  # callers read its signature
    return forward


def _around(leaf: nn.Module, site: Site, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with the operations of the active adapters around it, the first adapter's innermost."""
    for number, slot in enumerate(site.active):
        for operation, names in slot.inserts:
            tensors = {name: getattr(leaf, attribute) for name, attribute in names.items()}
            call = partial(operation.run, leaf, call, tensors, Share(slot.strength, site.route, number))
    return call


def _keeping(site: Site, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call during which each raw parameter's update is computed once, however often the module reads it.

    Not under torch.compile, which would break its graph here, and finds what is computed twice itself.
    """
    thread = this_thread()
    if is_compiling() or not any(slot.raw for slot in site.active) or thread in site.kept:
        return call(*args, **kwargs)
    site.kept[thread] = {}
    try:
        return call(*args, **kwargs)
    finally:
        del site.kept[thread]


def _stand_in(name: str) -> property:
    """A property over a parameter's name; `_parameters`, and so state dicts and optimizers, keep the base's own."""

    def read(self: nn.Module) -> torch.Tensor | None:
        return replacement(self, self._lk_site, name)  # type: ignore[arg-type]

    return property(read)


def wear(leaf: nn.Module, site: Site, replaced: frozenset[str]) -> None:
    """Give the leaf its adapted class, and take in an instance `forward` that stands on it (accelerate's hooks)."""
    leaf.__dict__["_lk_site"] = site
    if plain(type(leaf)) is type(leaf):
        site.inner = leaf.__dict__.pop("forward", None)
    leaf.__class__ = adapted(plain(type(leaf)), replaced)


def bare(leaf: nn.Module) -> None:
    """Give the leaf its own class (and its instance `forward`) back."""
    site: Site = leaf.__dict__.pop("_lk_site")
    leaf.__class__ = plain(type(leaf))
    leaf.__dict__.pop("forward", None)  # only what check_bare lets through
    if site.inner is not None:
        leaf.__dict__["forward"] = site.inner


def check_bare(leaf: nn.Module) -> None:
    """Raise where a `forward` was put on the leaf after attach: it holds on to the adapted one, and would outlive it."""
    forward = leaf.__dict__.get("forward")
    left_over = (
        isinstance(forward, MethodType) and forward.__func__.__module__ == __name__
    )  # by accelerate, hook removed
    if forward is not None and not left_over and plain(type(leaf)) is not type(leaf):
        raise AdapterError(
            f"{leaf._lk_site.path} was given a forward of its own after lorakit.attach (accelerate's hooks do that). "  # type: ignore[union-attr]
            "Take it off first, with accelerate.hooks.remove_hook_from_module(model, recurse=True), or add hooks before attach."
        )


def _reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
    cls = type(self)
    return _rebuild, (cls._lk_base, cls._lk_replaced), self.__getstate__()  # type: ignore[attr-defined,no-untyped-call]


def _rebuild(base: type[nn.Module], replaced: frozenset[str]) -> nn.Module:
    cls: type[nn.Module] = adapted(base, replaced)  # type: ignore[arg-type]
    return cls.__new__(cls)
