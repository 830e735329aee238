"""The hub: an adapter in PEFT's form in memory, and what every format asks of it."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.store.foreign.checked import config_faults
from lorakit.store.peft_config import CHANGES_BASE, DEFAULTS
from lorakit.store.peft_folder import EMBEDDING, LINEAR, MAGNITUDE, PREFIX

# Settings that change what is computed from the pairs, so that a format of plain pairs cannot carry them.
BEYOND = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "modules_to_save",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config",
)  # fmt: skip
NEEDS_BASE = (*CHANGES_BASE, "pissa", "olora")  # starts that other programs would need this base to undo


@dataclass(frozen=True)
class Adapter:
    """PEFT's configuration and tensors (its keys), and what only the file it came from knew.

    notes: stands in lorakit.json under "converted", so that the way back is exact. `names`: hub key -> the source's own
    key, where the format's writer would choose another.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


Bundle = dict[
    str, Adapter
]  # component of a pipeline ("unet", "text_encoder") -> adapter; {"": adapter} where it has none


@dataclass
class Sorted:
    """Tensors by what they are. pairs: path -> {0: A, 1: B}; others: full key -> tensor."""

    pairs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    others: dict[str, Tensor] = field(default_factory=dict)

    def rank(self, path: str) -> int:
        """The number of rows of A."""
        a = self.pairs[path][0]
        return int(a.shape[0]) if a.dim() else 0


def sort(tensors: Mapping[str, Tensor]) -> Sorted:
    """Tell pairs from everything else."""
    found = Sorted()
    for key, tensor in tensors.items():
        path, half, embedding = split(key)
        if half is None:
            found.others[key] = tensor
            continue
        found.pairs.setdefault(path, {})[half] = tensor
        if embedding:
            found.embeddings.add(path)
    return found


def split(key: str) -> tuple[str, int | None, bool]:
    """(module path, 0 for A and 1 for B and None for neither, whether of an embedding) of a hub key."""
    for endings in (LINEAR, EMBEDDING):
        for half, ending in enumerate(endings):
            if key.startswith(PREFIX) and key.endswith("." + ending):
                return key[len(PREFIX) : -len(ending) - 1], half, endings is EMBEDDING
    return key.removeprefix(PREFIX), None, False


def key_of(path: str, half: int, *, embedding: bool = False) -> str:
    """PEFT's key of one half of a pair."""
    return f"{PREFIX}{path}.{(EMBEDDING if embedding else LINEAR)[half]}"


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank that a configuration gives a module, by PEFT's rule: the first pattern that matches wins."""
    return int(_by_pattern(config.get("rank_pattern"), path, config.get("r", DEFAULTS["r"])))


def scaling_of(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) where rank-stabilised (arXiv 2312.03732), of a module whose pair has `rank`."""
    alpha = float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", DEFAULTS["lora_alpha"])))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def alpha_of(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """The alpha with which alpha / r is the module's scaling, None where no floating-point number is."""
    scaling = scaling_of(config, path, rank)
    alpha = scaling * rank
    return alpha if alpha / rank == scaling else None


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def make_config(ranks: Mapping[str, int], alphas: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A PEFT configuration for pairs of these ranks and alphas, by module path; the targets are full paths."""
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    plain = {
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {path: one for path, one in ranks.items() if one != rank},
        "alpha_pattern": {path: number(one) for path, one in alphas.items() if one != alpha},
    }
    if any(
        rank_of(plain, path) != ranks[path] or _by_pattern(plain["alpha_pattern"], path, alpha) != alphas[path]
        for path in ranks
    ):  # a path that is the end of another's: say that it begins there
        for name in ("rank_pattern", "alpha_pattern"):
            plain[name] = {f"^{re.escape(path)}": one for path, one in plain[name].items()}
    return {**DEFAULTS, "peft_type": "LORA", "inference_mode": True, "target_modules": list(ranks), **plain, **more}


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def number(value: float) -> int | float:
    """16.0 as 16: PEFT's alpha is a whole number wherever it can be."""
    return int(value) if float(value).is_integer() else float(value)


def faults_of(adapter: Adapter) -> list[str]:
    """What is wrong with an adapter on its own: halves alone, shapes or ranks that do not fit, values that are not finite."""
    found = sort(adapter.tensors)
    faults = config_faults(adapter.config)
    if faults:
        return faults
    faults = [] if found.pairs else ["no pair of LoRA tensors in it"]
    for path, halves in found.pairs.items():
        fault = _pair_fault(adapter.config, path, halves)
        if fault:
            faults.append(f"{path}: {fault}")
    faults += [
        f"{key}: holds values that are not finite (NaN or infinity)"
        for key, tensor in adapter.tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all())
    ]
    return faults


def _pair_fault(config: Mapping[str, Any], path: str, halves: Mapping[int, Tensor]) -> str | None:
    if len(halves) < 2:
        return f"lora_{'B' if 0 in halves else 'A'} is missing"
    a, b = halves[0], halves[1]
    if not a.is_floating_point() or not b.is_floating_point():
        return f"its tensors must hold floating-point numbers, not {a.dtype} and {b.dtype}"
    if config.get("target_parameters"):
        return None  # experts' tensors stand one behind the other: PEFT alone knows how many
    if a.dim() < 2 or b.dim() != a.dim() or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are no pair"
    if a.dim() == 2 and a.shape[0] != b.shape[1]:
        return f"lora_A has rank {a.shape[0]} and lora_B {b.shape[1]}"
    said = rank_of(config, path)
    return None if said == a.shape[0] else f"rank {a.shape[0]} in the file, {said} by its configuration"


def beyond_pairs(adapter: Adapter, settings: Sequence[str] = (), tensors: Sequence[str] = ()) -> list[str]:
    """All that an adapter has besides plain pairs, each by name: what a format of nothing but pairs must refuse.

    settings: configuration keys that the format does carry. tensors: endings of the tensors that it does carry.
    """
    others = sort(adapter.tensors).others
    faults = [f"{key}: {_nature(key)}" for key in others if not key.endswith(tuple(tensors))]
    faults += [
        f"{key} = {adapter.config[key]!r}"
        for key in BEYOND
        if key not in settings and adapter.config.get(key) not in (None, False, [], {}, DEFAULTS.get(key))
    ]
    if adapter.config.get("bias", "none") != "none" and not any(key.endswith("bias") for key in adapter.tensors):
        faults.append(f"bias = {adapter.config['bias']!r}")
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(NEEDS_BASE):
        faults.append(f"init_lora_weights = {init!r}: the adapter is right on a changed base alone")
    return faults


def _nature(key: str) -> str:
    if MAGNITUDE in key:
        return "a magnitude of DoRA"
    if "token_adapter" in key:
        return "rows of trained tokens"
    return "a trained bias" if key.endswith("bias") else "a module trained in full"


def plain_alphas(adapter: Adapter) -> tuple[dict[str, float], list[str]]:
    """(alpha by module path, faults): the alpha with which alpha / r is each pair's scaling."""
    found = sort(adapter.tensors)
    alphas: dict[str, float] = {}
    faults: list[str] = []
    for path in found.pairs:
        rank = found.rank(path)
        alpha = alpha_of(adapter.config, path, rank)
        if alpha is None:
            faults.append(
                f"{path}: its scaling {scaling_of(adapter.config, path, rank):.6g} is no alpha / {rank} exactly"
            )
        else:
            alphas[path] = alpha
    return alphas, faults


def embeddings_of(adapter: Adapter) -> list[str]:
    """A line for each pair that belongs to an embedding."""
    return [f"{path}: an adapter of an embedding" for path in sorted(sort(adapter.tensors).embeddings)]
