"""Where things are in a model: its leaves, its output head, the tensors that several modules share."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from torch import nn

from lorakit.attach.adapted import plain

HEAD_NAMES = ("score", "classifier", "qa_outputs")  # where Hugging Face's task models keep their head


def walk(model: nn.Module, closed: Callable[[nn.Module], bool] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, the same modules in the same order, in a third of the time: each attach goes through them.

    closed: whether what lies inside a module is left out."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if closed is not None and closed(module):
            continue
        below = f"{path}." if path else ""
        waiting += [(below + name, child) for name, child in reversed(module._modules.items()) if child is not None]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)` of a path that is known to be there, in a tenth of the time: a load asks for each leaf."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def parameters_of(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module path, name, parameter) in the order of `model.named_parameters()`, each shared one under its first name only."""
    seen: set[int] = set()
    for path, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, name, parameter


def output_head(model: nn.Module) -> str | None:
    """The path of the model's output head: its language-model head, else its classification head, else None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return next((path for path, module in walk(model) if module is head), None)
    children = dict(model.named_children())
    return next((name for name in HEAD_NAMES if name in children), None)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """(path, list) of the model's blocks in the order in which they run: its one list of modules of one class.

    None where there is no such list or several side by side (an encoder and a decoder); lists inside a block don't count.
    """
    found = block_lists(model)
    return found[0] if len(found) == 1 else None


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """(path, list) of every list of modules of one class that lies in no other: an encoder's blocks and a decoder's."""
    return [(path, module) for path, module in walk(model, _is_uniform) if _is_uniform(module)]  # type: ignore[misc]


def _is_uniform(module: nn.Module) -> bool:
    """Whether it is a list of modules of one class."""
    return isinstance(module, nn.ModuleList) and len({plain(type(one)) for one in module}) == 1


def is_within(path: str, parent: str) -> bool:
    """Whether `path` is `parent` or lies below it."""
    return path == parent or path.startswith(parent + ".")


def named_parameter_owners(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(module path, parameter name) of every parameter of the base, each shared one under its first name only."""
    seen: set[int] = set()
    for path, module in walk(model):
        ours = plain(type(module)) is not type(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and not (ours and name.startswith("lora_")) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, name


def is_adapters(module: nn.Module, name: str) -> bool:
    """Whether parameter `name` of `module` is an adapter's that is on, not the base's."""
    return name.startswith("lora_") and plain(type(module)) is not type(module)


def shared_with(model: nn.Module, path: str, name: str) -> list[str]:
    """The other names of parameter `path.name` where modules share it (tied embeddings and head); [] where none do."""
    owners: dict[int, list[str]] = defaultdict(list)
    for full, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(full)
    full = f"{path}.{name}" if path else name
    target = model.get_submodule(path)._parameters[name]
    return [other for other in owners[id(target)] if other != full]
