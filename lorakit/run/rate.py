"""The peak learning rate of a recipe that names none: the method's own, for a base 2,048 wide, more for narrower ones.

A rule of thumb between what is published and what was found here. With LoRA: 5e-4 for RoBERTa base (768 wide), 2e-4 to 4e-4
for RoBERTa large (1,024), but 1e-4 for DeBERTa XXL (1,536) and 2e-4 for GPT-2 medium (1,024) (Hu et al. 2021, tables 9 to 11);
1e-4 to 2e-4 for models of 7B (4,096). The searches of docs/benchmarks.md, on bases of 384 and 576, chose 2.5 times the method's
own in runs of several epochs, 2 to 50 times in runs of 30 to 126 steps.
"""

from dataclasses import replace
from typing import Any

from lorakit.attach.method import Method
from lorakit.run.recipe import Recipe
from lorakit.train.config import TrainConfig

WIDTH = 2048  # of the base whose rates the methods give
LEAST, MOST = 0.5, 5.0  # of the factor on them


def settings_on(recipe: Recipe, model: Any) -> TrainConfig:
    """The recipe's training settings, the rate filled in where it names none."""
    if recipe.train.lr is not None:
        return recipe.train
    return replace(recipe.train, lr=default_rate(recipe.method, model))


def default_rate(method: Method, model: Any) -> float:
    """Of several methods the lowest; the method's own where the model does not say how wide it is (a denoiser)."""
    own = min(one.learning_rate for one in method.members)
    width = _width(model)
    return own if width is None else float(f"{own * min(MOST, max(LEAST, WIDTH / width)):.2g}")


def _width(model: Any) -> int | None:
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None
