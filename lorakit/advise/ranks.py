"""The smallest rank of each layer that keeps a stated share of its update's energy, as a recipe's rank_pattern."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.analyze.ranks import by_energy
from lorakit.analyze.spectrum import energy, numerical_rank, singular_values
from lorakit.analyze.updates import Adapter, Update, read_adapter
from lorakit.attach.targets import pattern_value
from lorakit.errors import UsageError

ENERGY = 0.99


@dataclass(frozen=True)
class LayerAdvice:
    """One layer. rank: trained; advised: the smallest that keeps the share (parts of a fused matrix have one rank: the highest
    that one needs); kept: the share it keeps; parameters: one of its directions, in all parts. full: whether every direction of
    the trained rank is needed, so that a higher one might serve it."""

    path: str
    rank: int
    advised: int
    kept: float
    parameters: int
    full: bool


@dataclass(frozen=True)
class RankAdvice:
    """share: of ||dW||_F^2 that each layer keeps. r, alpha, rank_pattern, alpha_pattern: for a recipe's method, the scaling
    of each layer staying what it was."""

    source: str
    share: float
    layers: tuple[LayerAdvice, ...]
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @property
    def parameters_before(self) -> int:
        return sum(one.parameters * one.rank for one in self.layers)

    @property
    def parameters_after(self) -> int:
        return sum(one.parameters * one.advised for one in self.layers)

    def yaml(self) -> str:
        """Lines for the recipe's `method:`."""
        import yaml

        method: dict[str, Any] = {"r": self.r, "alpha": self.alpha}
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                method[name] = dict(getattr(self, name))
        return yaml.safe_dump({"method": method}, sort_keys=False)

    def as_dict(self) -> dict[str, Any]:
        counts = {"parameters_before": self.parameters_before, "parameters_after": self.parameters_after}
        return {**asdict(self), **counts, "yaml": self.yaml()}


def advise_ranks(source: str | Path, share: float = ENERGY) -> RankAdvice:
    """The advice for the adapter in `source` (a PEFT folder or hub id), which is only read.

    The spectrum says what this adapter uses, not what a shorter one would learn: train it and measure. Raises UsageError on a
    share that is none and on an adapter that was never trained, FileError on a damaged one.
    """
    adapter = read_adapter(source)
    _check_kind(adapter)
    parted = [_parted(adapter, update) for update in adapter.updates]
    each = iter(singular_values([part for parts in parted for part in parts]))
    values = [[next(each) for _ in parts] for parts in parted]
    if not any(numerical_rank(one) for parts in values for one in parts):
        raise UsageError(f"every update of {source} is zero: it was never trained, and its spectrum says nothing.")
    layers = []
    for update, parts, own in zip(adapter.updates, parted, values, strict=True):
        used = parts[0].rank
        advised = min(max(by_energy(own, share)), used)
        full = advised == used and any(numerical_rank(one) == used for one in own)
        trained = (
            used // 2 if _trained_as(adapter).get("init") else used
        )  # half of the file's is the start, taken off again
        cost = len(parts) * update.shape[1] + (update.shape[0] if len(parts) == 1 else _width_of(adapter, update))
        layers.append(LayerAdvice(update.path, trained, advised, min(_kept(one, advised) for one in own), cost, full))
    scales = {one.path: one.scale for one in adapter.updates}
    settings = {
        one.path: (one.advised, _alpha(adapter.method.use_rslora, scales[one.path], one.advised)) for one in layers
    }
    (r, alpha), _ = Counter(settings.values()).most_common(1)[0]
    return RankAdvice(
        source=str(source),
        share=share,
        layers=tuple(layers),
        r=r,
        alpha=alpha,
        rank_pattern={_pattern(path): rank for path, (rank, _) in settings.items() if rank != r},
        alpha_pattern={_pattern(path): own for path, (_, own) in settings.items() if own != alpha},
    )


def _trained_as(adapter: Adapter) -> Mapping[str, Any]:
    found = adapter.file.extra.get("trained_as")
    return found if isinstance(found, Mapping) else {}


def _enabled(adapter: Adapter, update: Update) -> list[bool]:
    """Which parts of a fused matrix were trained; [True] of any other."""
    given = _trained_as(adapter).get("enable_lora")
    parts = pattern_value(given, update.path, None) if isinstance(given, Mapping) else None
    return list(parts) if isinstance(parts, list) and any(parts) else [True]


def _parted(adapter: Adapter, update: Update) -> list[Update]:
    """The pairs that were trained, one below the other in the file's pair: an update each, whose other rows are 0."""
    count = sum(_enabled(adapter, update))
    if count == 1 or update.rank % count:
        return [update]
    pairs = list(zip(update.a.chunk(count, 0), update.b.chunk(count, 1), strict=True))
    if int(sum((b != 0).any(1).long() for _, b in pairs).max()) > 1:  # mixed since then (compressed, combined)
        return [update]
    return [replace(update, a=a, b=b) for a, b in pairs]


def _width_of(adapter: Adapter, update: Update) -> int:
    """The outputs of all trained parts together."""
    enabled = _enabled(adapter, update)
    return update.shape[0] * sum(enabled) // len(enabled)


def _check_kind(adapter: Adapter) -> None:
    """Refuse what has no rank for each of its parts."""
    parts = sorted({one.path.rpartition("[")[0] for one in adapter.updates if one.is_part})
    if parts:
        raise UsageError(
            f"{adapter.source}: the experts of a stack share one rank, and a grouped convolution's is a multiple of its groups, "
            f"so no rank of their own can be advised for the parts of {', '.join(parts[:3])}. lorakit analyze shows their use."
        )


def _kept(values: Any, rank: int) -> float:
    return float(energy(values)[min(rank, values.numel()) - 1])


def _alpha(rslora: bool, scaling: float, rank: int) -> float:
    alpha = round(scaling * (rank**0.5 if rslora else rank), 6)
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(path: str) -> str:
    """The path alone, as a pattern is read (a regular expression of a path's end)."""
    return f"^{re.escape(path)}"
