"""The section `compare` of a recipe."""

from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import RecipeError

MIDDLES = ("mean", "median")


@dataclass(frozen=True)
class SearchConfig:
    """How the learning rate of each method at each size is found."""

    budget: int = 3
    """The most learning rates tried for each; 1 = take the middle one of its grid, untried."""
    holdout: float = 0.1
    """Share of the training rows that is set aside to judge them (rows of one prompt stay together)."""
    seed: int = 0
    """Of the draw of these rows, and the one seed of the runs that try."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise RecipeError(f"compare.search.budget must be at least 1, not {self.budget}.")
        if not 0 < self.holdout < 1:
            raise RecipeError(f"compare.search.holdout must be a share in (0, 1), not {self.holdout}.")


@dataclass(frozen=True)
class LatencyConfig:
    """The forward pass that the added latency is measured on."""

    batches: tuple[int, ...] = (1, 16)
    """Rows of the batches."""
    length: int = 128
    """Tokens of a row (half of the model's longest, where that is less)."""
    trials: int = 10
    """Measured turns of each side; 0 = leave the latency out."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.trials < 0 or not self.batches or min(self.batches) < 1:
            raise RecipeError(
                "compare.latency takes batches and a length of at least 1, and trials of at least 0; came batches "
                f"{list(self.batches)}, length {self.length}, trials {self.trials}."
            )


@dataclass(frozen=True)
class GeneralConfig:
    """The general text whose perplexity tells what was forgotten (causal-lm)."""

    text: str | None = None
    """A plain text file that no training row comes from; None = not measured."""
    tokens: int = 8192
    """How much of it, from its beginning."""
    window: int = 256
    """Tokens that are read at once."""

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.window < 2:
            raise RecipeError(
                f"compare.general takes tokens and window of at least 2, not {self.tokens}, {self.window}."
            )


@dataclass(frozen=True)
class CompareConfig:
    """What is compared. Raises RecipeError for a value that makes no sense."""

    methods: tuple[Any, ...]
    """Each a method's name, or keys: `name` and its fields, or `combine` and a list of such; `label`; `sizes` {field: values},
    a row of its own each, or `sweep` for the method's usual ones; `lr` (fixed) or `lrs` (to choose from) in place of a grid
    around the method's own learning rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run each, with the best learning rate."""
    quality: str | None = None
    """The metric that is compared; None = the task's first, the first of evaluate.metrics for text, else the eval loss."""
    middle: str | None = None
    """What the table leads with: mean or median over the seeds; None = median for GLUE, as the paper, else mean."""
    few_shot: tuple[int, ...] | None = None
    """Numbers of examples before the prompt, a row of the table each (causal-lm); None = (4,)."""
    majority: bool = True
    """A row for the class that is most frequent in training (classification)."""
    memory: bool = True
    """Measure the peak memory of training, in a process of its own for each method and size."""
    search: SearchConfig = field(default_factory=SearchConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    general: GeneralConfig = field(default_factory=GeneralConfig)

    def __post_init__(self) -> None:
        if not self.methods:
            raise RecipeError("compare.methods is empty: name at least one method.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RecipeError(f"compare.seeds takes different seeds, at least one, not {list(self.seeds)}.")
        if self.middle is not None and self.middle not in MIDDLES:
            raise RecipeError(f"compare.middle must be one of {', '.join(MIDDLES)}, not {self.middle!r}.")
        if any(count < 1 for count in self.few_shot or ()):
            raise RecipeError(f"compare.few_shot takes numbers of examples of at least 1, not {self.few_shot}.")
