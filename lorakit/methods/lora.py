"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): `W + (alpha / r) B A` with W frozen, A random and B zero.

The published changes to it have files of their own beside this one (see lorakit.methods.variant).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import named_parameter_owners
from lorakit.attach.kinds import EmbeddingKind, LeafKind, is_attention, low_rank_kind
from lorakit.attach.method import Draft, Method
from lorakit.attach.targets import (
    ALL_LINEAR,
    Selection,
    find_modules,
    find_parameters,
    find_targets,
    matches,
    pattern_value,
)
from lorakit.errors import TargetError, UsageError
from lorakit.methods.dora import DoRA
from lorakit.methods.kept import add_copies, in_order, kept_places
from lorakit.methods.lora_plus import LoRAPlus
from lorakit.methods.pissa import from_base
from lorakit.methods.rslora import RsLoRA
from lorakit.methods.start import Starter, add_token_rows, tie
from lorakit.methods.variant import Variant

STARTS = ("kaiming", "gaussian")
BIASES = ("none", "all", "lora_only")
INITS = ("kaiming", "gaussian", "pissa", "pissa_niter_[number]", "olora")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of linear layers (nn.Linear, Hugging Face's Conv1D), convolutions, embeddings, raw parameters.

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
    """How A starts: "kaiming" (uniform, a = sqrt(5), as loralib and PEFT) or "gaussian" (standard deviation 1 / r), B being
    zero; or from the weight itself: "pissa", "pissa_niter_16" (its fast form) or "olora"."""
    use_dora: bool = False
    """Train the length of each output's weights beside their direction (lorakit.methods.dora)."""
    lora_bias: bool = False
    """Give B a bias."""
    lr_ratio: float = 1.0
    """LoRA+: B's learning rate over A's, 16 in the paper (lorakit.methods.lora_plus)."""
    enable_lora: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    """Fused projections, by name or regular expression of a path's end: which of their equal parts are adapted, each with a
    pair of its own. {"c_attn": [True, False, True]} is GPT-2's query and value (loralib's MergedLinear)."""
    target_parameters: Sequence[str] | None = None
    """Raw parameters (experts' weights) by the ends of their names, of two or three dimensions."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    """Rows of the input embeddings that are trained in full, for new tokens; or {name of an embedding: rows}."""
    ensure_weight_tying: bool = False
    """Where an adapted embedding shares its weight with the head, adapt both with the one pair."""

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
        if self.init not in STARTS and from_base(self.init) is None:
            raise UsageError(f"init must be one of {', '.join(INITS)}, not {self.init!r}.")
        if isinstance(self.lr_ratio, bool) or not isinstance(self.lr_ratio, int | float) or not self.lr_ratio > 0:
            raise UsageError(f"lr_ratio must be above 0 (1 = none; the paper's is 16), not {self.lr_ratio!r}.")
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

    def variants(self) -> list[Variant]:
        """The published changes to LoRA that this configuration asks for, in the order in which they act."""
        start = from_base(self.init)
        found: list[Variant] = [RsLoRA()] if self.use_rslora else []
        found += [start] if start is not None else []
        found += [DoRA()] if self.use_dora else []
        return found + ([LoRAPlus(self.lr_ratio)] if self.lr_ratio != 1.0 else [])

    def scaling(self, path: str) -> float:
        """The factor before B A at `path`: alpha / r, or what a variant makes of it."""
        r, alpha = self.rank(path), pattern_value(self.alpha_pattern, path, self.alpha)
        scaling = alpha / r
        for variant in self.variants():
            scaling = variant.scaling(alpha, r, scaling)
        return scaling

    def rank(self, path: str) -> int:
        """The rank at `path`."""
        return pattern_value(self.rank_pattern, path, self.r)

    def targets(self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> list[str]:
        """The paths of the layers of `model` that this configuration adapts. Raises TargetError where there are none.

        modules: the model's, by path, where the caller has them.
        """
        return list(self._leaves(model, modules))

    def _leaves(self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> dict[str, nn.Module]:
        if not self.target_modules:
            return {}  # target_parameters or trainable_token_indices alone
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
            modules,
        )

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        draft = Draft()
        leaves = self._leaves(model)
        starter = Starter(dtype, generator, self)
        for path, leaf in leaves.items():
            if is_attention(plain(type(leaf))):
                starter.attention(draft, path, leaf)
            else:
                draft.pairs[path] = starter.leaf(path, leaf)
        for key in self.enable_lora:
            if not any(pattern_value({key: True}, path, False) for path in draft.pairs):
                raise TargetError(
                    f"enable_lora names {key!r}, which none of the adapted layers is: {', '.join(leaves)}."
                )
        for path, name in self.raw_targets(model):
            if path in draft.pairs or name in draft.raw.get(path, {}):
                raise UsageError(
                    f"{path}.{name} is in target_parameters, and its layer is adapted already (target_modules): the update would "
                    "count twice. Leave it out of one of the two."
                )
            draft.raw.setdefault(path, {})[name] = starter.raw(path, model.get_submodule(path), name)
        for path, name in self._replaced(model, leaves):
            if name in draft.raw.get(path, {}):
                raise UsageError(
                    f"{path}.{name} is trained in full (modules_to_save) and takes a low-rank update (target_parameters). Leave "
                    "it out of one of the two."
                )
            add_copies(draft, model, [(path, name)], "modules_to_save")
        add_token_rows(draft, model, self.trainable_token_indices, dtype)
        if self.ensure_weight_tying:
            tie(draft, model)
        starter.warn()
        return draft

    def raw_targets(self, model: nn.Module) -> list[tuple[str, str]]:
        """(module path, parameter name) of the raw parameters that this configuration adapts."""
        return find_parameters(model, self.target_parameters or ())

    def token_indices(self, path: str) -> Sequence[int] | None:
        """The rows of the embedding at `path` that are trained in full; None where there are none."""
        asked = self.trainable_token_indices
        if not isinstance(asked, Mapping):
            return asked
        return next((rows for name, rows in asked.items() if matches([name], path)), None)

    def parts(self, path: str) -> tuple[bool, ...] | None:
        """Which parts of the fused projection at `path` are adapted; None where it is adapted as a whole."""
        parts = pattern_value(self.enable_lora, path, None)
        return None if parts is None else tuple(parts)

    def learning_rates(self, model: nn.Module, draft: Draft) -> Mapping[int, float]:
        rates: dict[int, float] = {}
        for variant in self.variants():
            for path, pair in draft.all_pairs():
                embedding = path in draft.pairs and isinstance(_kind(model, path), EmbeddingKind)
                for key, factor in variant.learning_rates(pair, embedding).items():
                    if getattr(pair, key) is not None:
                        rates[id(getattr(pair, key))] = factor
            for group in draft.replaced.values():
                for tensor in group.values():
                    if variant.replaced_rate(tensor) != 1.0:
                        rates[id(tensor)] = variant.replaced_rate(tensor)
        return rates

    def _replaced(self, model: nn.Module, adapted: Collection[str]) -> list[tuple[str, str]]:
        """(module path, parameter name) of what is trained in full: heads, and biases."""
        if self.bias == "none" and not self.modules_to_save:
            return []
        kept = kept_places(model, self.modules_to_save)
        biases = [
            (path, name)
            for path, name in named_parameter_owners(model)
            if name == "bias" and (self.bias == "all" or (self.bias == "lora_only" and path in adapted))
        ]
        return in_order(model, biases + kept)


def _kind(model: nn.Module, path: str) -> LeafKind | None:
    return low_rank_kind(plain(type(model.get_submodule(path))))


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        raise UsageError(f"{name} must be a whole number of at least 1, not {rank!r}.")


def _check_names(method: LoRA) -> None:
    elsewhere = method.target_parameters or method.trainable_token_indices
    if not method.target_modules and not elsewhere:
        raise UsageError("target_modules is empty: name the layers to adapt, or 'all-linear'.")
    for key in ("modules_to_save", "target_parameters"):
        if isinstance(getattr(method, key), str):
            raise UsageError(f"{key} is a list of names: [{getattr(method, key)!r}].")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"):
        value = getattr(method, key)
        listed = isinstance(value, Collection) and all(isinstance(name, str) for name in value)
        if value is not None and not listed:
            raise UsageError(f"{key} must be names of modules, not {value!r}.")
