"""The smallest rank of each layer that keeps a stated share of its update's energy, as a recipe's rank_pattern."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.analyze.ranks import by_energy
from lorakit.analyze.spectrum import energy, numerical_rank, singular_values
from lorakit.analyze.updates import Adapter, read_adapter
from lorakit.errors import UsageError

ENERGY = 0.99


@dataclass(frozen=True)
class LayerAdvice:
    """One layer. rank: trained; advised: the smallest that keeps the share; kept: the share it keeps; parameters: one of its
    directions. full: whether every direction of the trained rank is needed, so that a higher one might serve it."""

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
    values = singular_values(adapter.updates)
    wanted = by_energy(values, share)
    if not any(numerical_rank(one) for one in values):
        raise UsageError(f"every update of {source} is zero: it was never trained, and its spectrum says nothing.")
    layers = []
    for update, own, rank in zip(adapter.updates, values, wanted, strict=True):
        advised = min(rank, update.rank)
        full = advised == update.rank and numerical_rank(own) == update.rank
        layers.append(LayerAdvice(update.path, update.rank, advised, _kept(own, advised), sum(update.shape), full))
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
