"""What an adapter adds to a forward pass (the paper's Table 1), unmerged and merged, on the compared model."""

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.attach.api import detach
from lorakit.attach.host import host_of
from lorakit.attach.merge import merge, unmerge
from lorakit.compare.child import Child, attach_for_measuring
from lorakit.compare.config import LatencyConfig
from lorakit.errors import LorakitError
from lorakit.generate.modes import evaluating
from lorakit.models.limits import longest_row
from lorakit.run.recipe import IMAGE_CLASSIFICATION
from lorakit.run.subject import NAME
from lorakit.run.turns import Side, adapted_side, in_turns, merged_side, plain_side

BASE, ADAPTED, MERGED = "base", "adapted", "merged"


@dataclass(frozen=True)
class Added:
    """Of one batch size. seconds: the base's, median; over, merged_over: time over the base's in the same trial, median (None:
    cannot be merged); spread, merged_spread: the middle half of these ratios.
    """

    batch: int
    length: int
    seconds: float
    over: float
    spread: tuple[float, float]
    merged_over: float | None
    merged_spread: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def added_latency(child: Child, config: LatencyConfig, progress: Callable[[int, int], None]) -> list[Added]:
    """The added latency of the child's method, a figure a batch size; none for images. The model is as before afterwards."""
    if child.recipe.task == IMAGE_CLASSIFICATION or not config.trials:
        return []
    attach_for_measuring(child)
    model = child.model
    record = host_of(model).records[NAME]
    sides = [plain_side(BASE), adapted_side(ADAPTED, model, record)]
    if _merges(model):
        sides.append(merged_side(MERGED, model, record))
    detach(model, NAME)
    with evaluating(model):
        return [_added(child, config, batch, sides, progress) for batch in config.batches]


def _merges(model: Any) -> bool:
    with suppress(LorakitError):
        merge(model)
        unmerge(model)
        return True
    return False


def _added(
    child: Child, config: LatencyConfig, batch: int, sides: list[Side], progress: Callable[[int, int], None]
) -> Added:
    model = child.model
    longest = longest_row(model, child.loaded.tokenizer)
    length = config.length if longest is None else max(1, min(config.length, longest // 2))
    inputs = _inputs(model, batch, length)
    times = in_turns(sides, lambda: model(**inputs), config.trials, progress=progress)
    over, spread = _over(times, ADAPTED)
    merged = _over(times, MERGED) if MERGED in times else (None, None)
    return Added(batch, length, statistics.median(times[BASE]), over, spread, *merged)


def _over(times: dict[str, list[float]], side: str) -> tuple[float, tuple[float, float]]:
    ratios = sorted(mine / base for mine, base in zip(times[side], times[BASE], strict=True))
    if len(ratios) < 2:
        return ratios[0], (ratios[0], ratios[0])
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (low, high)


def _inputs(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (batch, length), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return {key: value.to(model.device) for key, value in inputs.items()}
