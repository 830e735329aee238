"""Parameters that an adapter has a copy of its own for: heads that are trained in full (modules_to_save), biases, all."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import is_adapters, is_within, named_parameter_owners
from lorakit.attach.method import Draft, Method, Several
from lorakit.attach.quantized import is_quantized
from lorakit.attach.targets import find_modules
from lorakit.errors import TargetError, UsageError

Place = tuple[str, str]  # (module path, parameter name)


def kept_places(model: nn.Module, names: Sequence[str] | None) -> list[Place]:
    """The parameters of the modules that `names` name, in the model's order.

    A head that shares its weight with the embeddings is among them under its own name: it is trained apart from them.
    """
    kept = find_modules(model, names or ())
    found = [place for place in named_parameter_owners(model) if any(is_within(place[0], module) for module in kept)]
    return found + _shared_heads(model, kept, found) if kept else []


def _shared_heads(model: nn.Module, kept: Sequence[str], found: Sequence[Place]) -> list[Place]:
    """Parameters of a kept module that stand under another module's name first (a head tied to the embeddings)."""
    extra = []
    for module in kept:
        for full, _ in model.get_submodule(module).named_parameters():
            path, _, name = f"{module}.{full}".rpartition(".")
            if (path, name) not in found and not is_adapters(model.get_submodule(path), name):
                extra.append((path, name))
    return extra


def in_order(model: nn.Module, places: Iterable[Place]) -> list[Place]:
    """The places, each once, in the model's order; those that bear another name there (shared ones) last."""
    asked = dict.fromkeys(places)
    first = [place for place in named_parameter_owners(model) if place in asked]
    return list(dict.fromkeys([*first, *asked]))


def keep(draft: Draft, model: nn.Module, names: Sequence[str] | None) -> Draft:
    """`draft` with a copy of each parameter of the modules that `names` name; those it has already stay."""
    add_copies(draft, model, kept_places(model, names), "modules_to_save")
    return draft


def add_copies(draft: Draft, model: nn.Module, places: Iterable[Place], why: str) -> None:
    """Give the draft a tensor of its own for each parameter. why: the option that asks for it, for messages."""
    for path, name in places:
        if name not in draft.replaced.get(path, {}):
            tensor = own_copy(model, path, name, why)
            if tensor is not None:
                draft.replaced.setdefault(path, {})[name] = tensor


def own_copy(model: nn.Module, path: str, name: str, why: str) -> Tensor | None:
    """A copy of one parameter, None where the module has none. Raises TargetError where it cannot be trained in full."""
    module = model.get_submodule(path)
    own = module._parameters[name]
    full = f"{path}.{name}" if path else name
    if is_quantized(own):
        raise TargetError(
            f"{full} is quantised and cannot be trained in full. Leave it out of {why}, or load the base with that module "
            "unquantised."
        )
    if isinstance(module, nn.RNNBase):
        raise TargetError(
            f"{full} belongs to a {type(module).__name__} of PyTorch's, which reads its parameters past their names, so a copy "
            f"would be ignored. Leave it out of {why}."
        )
    if own is not None and not own.is_floating_point() and not own.is_complex():
        return None  # whole numbers take no gradient
    return None if own is None else own.detach().clone(memory_format=torch.contiguous_format)


def check_kept(names: object) -> None:
    """Raise UsageError where modules_to_save is no list of names."""
    if isinstance(names, str):
        raise UsageError(f"modules_to_save is a list of names: [{names!r}].")
    listed = isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)
    if names is not None and not listed:
        raise UsageError(f"modules_to_save must be names of modules, not {names!r}.")


def kept_of(draft: Draft, head: str | None) -> list[Tensor]:
    """The tensors that a draft trains in full in the head at path `head`; none where there is no head."""
    groups = [group for path, group in draft.replaced.items() if head is not None and is_within(path, head)]
    return [tensor for group in groups for tensor in group.values()]


def with_head(method: Method, head: str | None) -> Method:
    """`method` that trains the module `head` in full too, unless it names what is trained so; of several the first that can."""
    parts = list(method.members)
    able = [i for i, one in enumerate(parts) if any(field.name == "modules_to_save" for field in fields(one))]  # type: ignore[arg-type]
    named = any(getattr(parts[i], "modules_to_save") is not None for i in able)  # noqa: B009  # not a field of every method
    if head is None or named or not able:
        return method
    parts[able[0]] = replace(parts[able[0]], modules_to_save=[head])  # type: ignore[type-var]
    return Several(tuple(parts)) if isinstance(method, Several) else parts[0]
