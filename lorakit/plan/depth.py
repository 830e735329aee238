"""A deep model's step from two shallow ones: every term is a straight line in the number of equal blocks."""

import copy
from collections.abc import Callable
from dataclasses import astuple

from torch import nn

from lorakit.plan.trace import Traced

DEEP = 16
"""Models of more blocks than this are traced at DEPTHS and continued; shallower ones whole."""
DEPTHS = (4, 8)


def blocks(model: nn.Module) -> list[str]:
    """The paths of the lists that hold the model's blocks: the longest ModuleList, and others as long."""
    found = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    longest = max(found.values(), default=0)
    return [path for path, length in found.items() if length == longest > 1]


def shortened(model: nn.Module, paths: list[str], depth: int) -> nn.Module:
    """A copy with the first `depth` blocks of each list."""
    whole = {path: model.get_submodule(path)._modules for path in paths}
    try:
        for path, modules in whole.items():
            kept = list(modules.items())[:depth]
            model.get_submodule(path)._modules = dict(kept)
        return copy.deepcopy(model)
    finally:
        for path, modules in whole.items():
            model.get_submodule(path)._modules = modules


def continued(depth: int, at: Callable[[int], tuple[Traced, int]], size: int) -> Traced | None:
    """The trace at `depth` blocks. at: blocks -> (trace, number of all parameters and of the trained ones); size: theirs at
    `depth`. None where the blocks are not alike, told by the numbers of parameters: then the line means nothing."""
    low, high = DEPTHS
    (short, small), (long, large) = at(low), at(high)

    def line(a: int, b: int) -> int:
        return a + (b - a) * (depth - low) // (high - low)

    if line(small, large) != size:
        return None
    return Traced(*(line(a, b) for a, b in zip(astuple(short), astuple(long), strict=True)))
