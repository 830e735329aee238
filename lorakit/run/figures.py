"""The figures of a finished run: what summary.json holds."""

import shlex
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorakit.attach.api import count_parameters
from lorakit.run.device import model_bytes, peak_memory
from lorakit.run.folder import RunFolder
from lorakit.run.rate import settings_on
from lorakit.run.recipe import Recipe
from lorakit.store.layout import TENSORS
from lorakit.train.state import TrainState


def figures(
    recipe: Recipe,
    folder: RunFolder,
    model: nn.Module,
    state: TrainState,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    """before, after: the base's metrics and the adapter's. tokens_per_second: of training alone; sizes in bytes."""
    counts = count_parameters(model)
    return {
        "model": recipe.model,
        "task": recipe.task,
        "steps": state.step,
        "best_step": state.best_step,
        "learning_rate": settings_on(recipe, model).rate,
        "trainable_parameters": counts.trainable,
        "low_rank_parameters": counts.low_rank,
        "total_parameters": counts.total,
        "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.rglob(TENSORS)),
        "model_bytes": model_bytes(model),
        "peak_memory_bytes": peak_memory(),
        "training_seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds if state.tokens else None,
        "before": before,
        "after": after,
    }


def next_steps(folder: RunFolder, *, answers: bool) -> list[tuple[str, str]]:
    """(what, command) of what may follow a run. answers: the model writes text."""
    place, merged = (shlex.quote(f"{folder.path}{end}") for end in ("", "-merged"))
    steps = [
        ("Measure it on other data", f"lorakit evaluate {place} --data FILE"),
        ("Look at the adapter", f"lorakit inspect {place}"),
        ("Merge it into a plain transformers model", f"lorakit merge {place} --out {merged}"),
    ]
    if answers:
        steps.insert(0, ("Answer prompts of your own", f"lorakit generate {place} --prompt '...'"))
    return steps
