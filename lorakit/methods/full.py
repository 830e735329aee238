"""Full fine-tuning, of all parameters or the top k blocks (Hu et al. 2021, arXiv 2106.09685, section 5.1: FT and FT-Top2)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lorakit.attach.anatomy import blocks, is_adapters, is_within, walk
from lorakit.attach.method import Draft, Method
from lorakit.errors import TargetError, UsageError
from lorakit.methods.kept import Place, check_kept, keep, own_copy


@dataclass(frozen=True)
class FullFineTuning(Method):
    """A trained copy of every parameter, which takes the base's place while the adapter is on; the base stays as it is.

    The copies keep the base's dtype. A weight that modules share (tied embeddings and head) stays one.
    """

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 2.0e-5  # a tenth of LoRA's

    top_layers: int | None = None
    """Train only so many of the last blocks, in place of everything: neither embeddings nor final norm nor head."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained beside the top blocks (a classification head)."""

    def __post_init__(self) -> None:
        top = self.top_layers
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise UsageError(f"top_layers must be a whole number of at least 1, or None for everything, not {top!r}.")
        check_kept(self.modules_to_save)

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        draft = Draft()
        within = self._top(model)
        for names in _owners(model):
            inside = [place for place in names if within is None or any(is_within(place[0], block) for block in within)]
            if not inside:
                continue
            copy = own_copy(model, *inside[0], "full fine-tuning")
            if copy is not None:
                for path, name in names if within is None else inside:
                    draft.replaced.setdefault(path, {})[name] = copy
        if not draft.replaced:
            raise TargetError(f"{type(model).__name__} has no parameters that could be trained.")
        return keep(draft, model, self.modules_to_save)

    def _top(self, model: nn.Module) -> list[str] | None:
        """The paths of the top blocks; None = everything is trained."""
        if self.top_layers is None:
            return None
        found = blocks(model)
        if found is None:
            raise TargetError(
                f"{type(model).__name__} has no single list of blocks of which the top could be taken (an encoder and a decoder "
                "have two). Leave out top_layers, or name what to train in modules_to_save of another method."
            )
        path, stack = found
        if self.top_layers > len(stack):
            raise TargetError(f"top_layers={self.top_layers}, but {type(model).__name__} has {len(stack)} blocks.")
        return [f"{path}.{number}" for number in range(len(stack) - self.top_layers, len(stack))]


def _owners(model: nn.Module) -> Iterator[list[Place]]:
    """All names of each parameter of the base, in the model's order."""
    owners: dict[int, list[Place]] = defaultdict(list)
    for path, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_adapters(module, name):
                owners[id(parameter)].append((path, name))
    return iter(owners.values())
