"""A model's modules over tensors without values: what a method would add to it is seen there at no cost in memory."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.attach.method import Draft, Method

PLAIN = (Tensor, nn.Parameter)


def outline(method: Method, model: nn.Module) -> Draft:
    """The draft of `method` on `model` with tensors on the meta device: paths, names, shapes. Draws no random number.

    Whatever numbers a configuration from a file names, nothing is allocated. Raises what `method.draft` raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when the adapter was attached
        return method.draft(skeleton(model), dtype=None, generator=None)


def skeleton(model: nn.Module) -> nn.Module:
    """A second tree of `model`'s modules, to be looked at and not to be called. Quantised parameters are the model's own."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Any] = {}

    def bare(tensor: Tensor | None) -> Any:
        if tensor is None or type(tensor) not in PLAIN:
            return tensor
        if id(tensor) not in tensors:
            empty = torch.empty_like(tensor, device="meta")
            tensors[id(tensor)] = (
                nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
            )
        return tensors[id(tensor)]

    def twin(module: nn.Module | None) -> nn.Module | None:
        if module is None:
            return None
        if id(module) not in modules:
            made = modules[id(module)] = type(module).__new__(type(module))
            made.__dict__.update(module.__dict__)
            made.__dict__["_parameters"] = {name: bare(tensor) for name, tensor in module._parameters.items()}
            made.__dict__["_buffers"] = {name: bare(tensor) for name, tensor in module._buffers.items()}
            made.__dict__["_modules"] = {name: twin(child) for name, child in module._modules.items()}
        return modules[id(module)]

    return cast(nn.Module, twin(model))
