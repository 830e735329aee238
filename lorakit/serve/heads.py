"""Classification heads: each adapter may bring its own, for as many classes as its task has.

The base's head is taken out of the forward for the rows of such an adapter: the head of each computes its own rows, and
outputs are filled up to the widest, of which each row is given its own part.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.errors import FileError

NAMES = ("classifier", "score")  # what transformers calls the heads of its sequence classifiers


def head_path(model: nn.Module) -> str | None:
    """The name of a classifier's head; None where the model has none."""
    return next((name for name, _ in model.named_children() if name in NAMES), None)


def classes_of(model: Any, tensors: Mapping[str, Tensor]) -> int | None:
    """For how many classes a file's head is; None where the file has none. tensors: the file's own, by the model's names."""
    path = head_path(model)
    if path is None or not any(name.startswith(f"{path}.") for name in tensors):
        return None
    own = {f"{path}.{name}": p.shape for name, p in model.get_submodule(path).named_parameters()}
    last = [name for name, shape in own.items() if len(shape) == 2 and shape[0] == model.config.num_labels]
    for name in reversed(last):
        if name in tensors and tensors[name].dim() == 2:
            return tensors[name].shape[0]
    raise FileError(
        "the adapter cannot be loaded:", [f"{path}: the file has tensors of a head, and not its last weight"]
    )


def skeleton(model: Any, classes: int) -> Any:
    """The same architecture, without values, with a head for `classes` classes: what a file with such a head must fit."""
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    with torch.device("meta"):
        return type(model)(config)


class Heads:
    """Stands in for the head of a served classifier, until `close`. rows: the adapter of each row of the next forward."""

    def __init__(self, model: Any) -> None:
        path = head_path(model)
        self.head: nn.Module = model.get_submodule(path)
        self.plain = copy.deepcopy(self.head)
        self.path = path
        self.rows: Sequence[int] = ()
        self.own: Mapping[int, dict[str, Tensor]] = {}
        self.head.__dict__["forward"] = self

    def __call__(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """features: (rows, ...) -> (rows, ..., widest number of classes)."""
        members = list(dict.fromkeys(row if row in self.own else -1 for row in self.rows))
        outputs = []
        for member in members:
            chosen = [k for k, row in enumerate(self.rows) if (row if row in self.own else -1) == member]
            where = torch.tensor(chosen, device=features.device)
            outputs.append((where, self._one(member, features[where], args, kwargs)))
        if len(outputs) == 1:
            return outputs[0][1]
        wide = max(output.shape[-1] for _, output in outputs)
        first = outputs[0][1]
        whole = first.new_zeros(len(self.rows), *first.shape[1:-1], wide)
        for where, output in outputs:
            whole[where, ..., : output.shape[-1]] = output
        return whole

    def _one(self, member: int, features: Tensor, args: Any, kwargs: Any) -> Tensor:
        if member < 0:
            return self.plain(features, *args, **kwargs)  # type: ignore[no-any-return]
        own = {name: tensor.to(features.device) for name, tensor in self.own[member].items()}
        return functional_call(self.plain, own, (features, *args), kwargs)  # type: ignore[no-any-return]

    def close(self) -> None:
        self.head.__dict__.pop("forward", None)
