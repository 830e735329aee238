"""Where things are in a model: its leaves, its output head, the tensors that several modules share."""

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from lorakit.attach.adapted import plain

HEAD_NAMES = ("score", "classifier", "qa_outputs")  # where Hugging Face's task models keep their head


def output_head(model: nn.Module) -> str | None:
    """The path of the model's output head: its language-model head, else its classification head, else None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return next((path for path, module in model.named_modules() if module is head), None)
    children = dict(model.named_children())
    return next((name for name in HEAD_NAMES if name in children), None)


def is_within(path: str, parent: str) -> bool:
    """Whether `path` is `parent` or lies below it."""
    return path == parent or path.startswith(parent + ".")


def named_parameter_owners(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(module path, parameter name) of every parameter of the base, each shared one under its first name only."""
    for name, _ in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if not is_adapters(model.get_submodule(path), leaf):
            yield path, leaf


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
