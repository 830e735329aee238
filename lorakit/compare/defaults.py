"""Sizes and learning rates that a comparison tries where its recipe names none."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.attach.method import Method
from lorakit.methods.table import METHODS

SWEEP = "sweep"
STEPS = (1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30)
"""The grid of rates around the method's own learning rate, from which the search begins."""

BOTTLENECKS = ("houlsby", "lin", "pfeiffer", "adapter-drop", "residual-adapter")
PROMPTS = ("prompt-tuning", "p-tuning")
SWEEPS: dict[str, Mapping[str, Sequence[Any]]] = {
    "lora": {"r": (1, 4, 16, 64)},
    "prefix-tuning": {"prefix_length": (4, 16, 64)},
    "prefix-embedding": {"prefix_length": (8, 32, 64)},
    **{name: {"r": (4, 16, 64)} for name in BOTTLENECKS},
    **{name: {"length": (5, 20, 60)} for name in PROMPTS},
}
"""What `sizes: sweep` runs through: method -> field -> values."""


def rates_around(names: Sequence[str]) -> tuple[float, ...]:
    """Rates from low to high around the learning rate of the methods (of a combination the geometric mean of theirs)."""
    centres = [METHODS.get(name, Method).learning_rate for name in names]
    centre = math.exp(sum(map(math.log, centres)) / len(centres))
    return tuple(float(f"{centre * step:.1g}") for step in STEPS)
