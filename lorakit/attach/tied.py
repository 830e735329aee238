"""Taking a shared parameter apart for a merge that changes one of its users alone, and putting it together again.

An embedding and a head that share their weight compute other things once one of them is adapted: merging then has to
give that one a weight of its own, or the other would change too (PEFT merges into both).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakit.attach.host import Host, Untied


def untie(model: nn.Module, host: Host, places: Iterable[tuple[str, str]], done: Untied) -> None:
    """Give each of `places`, (leaf path, parameter name), a parameter of its own where others share it.

    What is done is noted in `done` as it happens. A configuration that says the weights are tied then says they are not,
    so that the merged model is saved and loaded with both.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    users = {key: len(shared) for key, shared in names.items()}
    for path, name in places:
        shared = host.leaves[path]._parameters[name]
        if shared is None or users[id(shared)] < 2:
            continue
        users[id(shared)] -= 1
        own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        host.leaves[path]._parameters[name] = own
        done.parameters[path, name] = shared
        first, *others = names[
            id(shared)
        ]  # all of them are names of parameters of their own, should the merge be final
        host.flags.update(dict.fromkeys(others, host.flags[first]))
    if done.parameters:
        for config in _configs(model):
            if config.__dict__.get("tie_word_embeddings"):
                config.tie_word_embeddings = False
                done.configs.append(config)


def tie_again(host: Host, done: Untied) -> None:
    """Undo `untie`."""
    for (path, name), parameter in done.parameters.items():
        host.leaves[path]._parameters[name] = parameter
    for config in done.configs:
        config.tie_word_embeddings = True


def _configs(model: nn.Module) -> list[Any]:
    """The model's configuration and that of its text part, where it has any."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    return [one for one in (config, text) if one is not None and not isinstance(one, dict)]
