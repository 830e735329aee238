"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): `W + (alpha / r) B A` with W frozen, A random and B zero.

use_rslora scales by `alpha / sqrt(r)` instead (Kalajdzievski 2023, arXiv 2312.03732).
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import is_adapters, is_within, named_parameter_owners
from lorakit.attach.kinds import LeafKind, low_rank_kind
from lorakit.attach.method import Draft, Method, Pair
from lorakit.attach.targets import ALL_LINEAR, Selection, find_modules, find_targets, pattern_value
from lorakit.errors import TargetError, UsageError

BIASES = ("none", "all", "lora_only")
INITS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of linear layers (nn.Linear, Hugging Face's Conv1D) and embeddings.

    The fields follow PEFT's LoraConfig, its matching rules included (lorakit.attach.targets).
    """

    name: ClassVar[str] = "lora"

    r: int = 8
    """Rank of the update."""
    alpha: float = 16
    """The update is scaled by alpha / r."""
    target_modules: str | Sequence[str] = ALL_LINEAR
    """Names (each matches a path exactly or by `.suffix`), a regular expression over whole paths, or "all-linear"."""
    dropout: float = 0.0
    """Probability with which an entry of the update's input is dropped in training."""
    bias: str = "none"
    """Biases trained beside the update: "none", "all" of the model, or "lora_only" (those of the adapted layers)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks other than r, by name or regular expression of a path's end; the first match wins."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas other than alpha, likewise."""
    exclude_modules: str | Sequence[str] | None = None
    """What target_modules matches but is left alone; the same rules."""
    layers_to_transform: int | Sequence[int] | None = None
    """Numbers of the layers to adapt; None = all."""
    layers_pattern: str | Sequence[str] | None = None
    """The name before a layer's number ("h", "layers"); None = the first number in a path."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""
    init: str = "kaiming"
    """How A starts: "kaiming" (uniform, a = sqrt(5), as loralib and PEFT) or "gaussian" (standard deviation 1 / r)."""

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise UsageError(f"{key} must be a finite number, not {alpha!r}.")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"dropout must be a probability in [0, 1), not {self.dropout!r}.")
        if self.bias not in BIASES:
            raise UsageError(f"bias must be one of {', '.join(BIASES)}, not {self.bias!r}.")
        if self.init not in INITS:
            raise UsageError(f"init must be one of {', '.join(INITS)}, not {self.init!r}.")
        if (
            isinstance(self.target_modules, str)
            and self.target_modules != ALL_LINEAR
            and self.layers_to_transform is not None
        ):
            raise UsageError(
                "layers_to_transform goes with a list of target_modules or 'all-linear'; a regular expression names its own."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("layers_pattern says where layers_to_transform finds its numbers: give both, or neither.")
        _check_names(self)

    def scaling(self, path: str) -> float:
        """The factor before B A at `path`: alpha / r, or alpha / sqrt(r) with use_rslora."""
        r, alpha = self.rank(path), pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def rank(self, path: str) -> int:
        """The rank at `path`."""
        return pattern_value(self.rank_pattern, path, self.r)

    def targets(self, model: nn.Module) -> list[str]:
        """The paths of the layers of `model` that this configuration adapts. Raises TargetError where there are none."""
        layers = self.layers_to_transform
        pattern = self.layers_pattern
        return find_targets(
            model,
            Selection(
                target=self.target_modules,
                exclude=self.exclude_modules,
                layers=[layers] if isinstance(layers, int) else layers,
                layers_pattern=[pattern] if isinstance(pattern, str) else pattern,
                kept_whole=find_modules(model, self.modules_to_save or ()),
            ),
        )

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        draft, wide = Draft(), {}
        targets = self.targets(model)
        for path in targets:
            leaf = model.get_submodule(path)
            kind = low_rank_kind(plain(type(leaf)))
            if kind is None:
                raise TargetError(f"{path} ({type(leaf).__name__}) takes no low-rank update.")
            r, shape = self.rank(path), kind.shape(leaf)
            if r > min(shape):
                wide[path] = shape
            draft.pairs[path] = self._pair(path, leaf, kind, dtype, generator)
        for path, name in self._replaced(model, targets):
            own = model.get_submodule(path)._parameters[name]
            if own is not None:
                draft.replaced.setdefault(path, {})[name] = own.detach().clone()
        _warn_wide(wide)
        return draft

    def _pair(
        self, path: str, leaf: nn.Module, kind: LeafKind, dtype: torch.dtype | None, generator: torch.Generator | None
    ) -> Pair:
        weight = leaf._parameters["weight"]
        if weight is None:
            raise TargetError(f"{path} has no weight to adapt.")
        like = dtype or (weight.dtype if weight.is_floating_point() else torch.float32)
        r, (d_in, d_out) = self.rank(path), kind.shape(leaf)
        if kind.zero == "A":  # an embedding, as loralib: At (vocab, r) zero, Bt (r, dim) from N(0, 1)
            at = torch.zeros(d_in, r, dtype=like, device=weight.device)
            return Pair(
                at, _random((r, d_out), "normal", like, weight.device, generator), self.scaling(path), self.dropout
            )
        a = _random((r, d_in), self.init, like, weight.device, generator)
        return Pair(a, torch.zeros(r, d_out, dtype=like, device=weight.device), self.scaling(path), self.dropout)

    def _replaced(self, model: nn.Module, targets: Sequence[str]) -> list[tuple[str, str]]:
        """(module path, parameter name) of what is trained in full: heads, and biases."""
        kept = find_modules(model, self.modules_to_save or ())
        adapted = set(targets)
        found = []
        for path, name in named_parameter_owners(model):
            biased = name == "bias" and (self.bias == "all" or (self.bias == "lora_only" and path in adapted))
            if biased or any(is_within(path, module) for module in kept):
                found.append((path, name))
        return found + _shared_heads(model, kept, found)


def _shared_heads(model: nn.Module, kept: Sequence[str], found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Parameters of a kept module that stand under another module's name first (a head tied to the embeddings)."""
    extra = []
    for module in kept:
        for full, _ in model.get_submodule(module).named_parameters():
            path, _, name = f"{module}.{full}".rpartition(".")
            if (path, name) not in found and not is_adapters(model.get_submodule(path), name):
                extra.append((path, name))
    return extra


def _random(
    shape: tuple[int, int], how: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Initial values, drawn in float32 on the CPU so that a seed gives the same on every device and in every dtype."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    if how == "kaiming":
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    else:
        nn.init.normal_(values, std=1.0 / shape[0] if how == "gaussian" else 1.0, generator=generator)
    return values.to(device=device, dtype=dtype)


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        raise UsageError(f"{name} must be a whole number of at least 1, not {rank!r}.")


def _check_names(method: LoRA) -> None:
    if not method.target_modules:
        raise UsageError("target_modules is empty: name the layers to adapt, or 'all-linear'.")
    if isinstance(method.modules_to_save, str):
        raise UsageError(f"modules_to_save is a list of names: [{method.modules_to_save!r}].")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = getattr(method, key)
        listed = isinstance(value, Collection) and all(isinstance(name, str) for name in value)
        if value is not None and not listed:
            raise UsageError(f"{key} must be names of modules, not {value!r}.")


def _warn_wide(wide: Mapping[str, tuple[int, int]]) -> None:
    if wide:
        path, shape = next(iter(wide.items()))
        warnings.warn(
            f"the rank is larger than the smaller side of {len(wide)} adapted matrices (first {path}: {shape[0]} x {shape[1]}): "
            "the matrix itself bounds the update's rank, so a smaller r gives the same with fewer parameters.",
            UserWarning,
            stacklevel=5,
        )
