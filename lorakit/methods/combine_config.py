"""The configuration of a combination: a lorakit.LoRA under which its pairs have just the ranks and scales that they have."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import is_within
from lorakit.attach.kinds import EmbeddingKind, is_attention, low_rank_kind
from lorakit.attach.method import Draft
from lorakit.attach.targets import find_modules, matches, shortest_names
from lorakit.errors import AdapterError
from lorakit.methods.combine_whole import Part
from lorakit.methods.lora import BIASES, LoRA


@dataclass(frozen=True)
class Place:
    """One pair of the combination. name: of a raw parameter, else empty; rank: as a configuration counts it."""

    path: str
    name: str
    A: Tensor
    Bt: Tensor
    rank: int
    scale: float
    bias: Tensor | None


def configured(model: nn.Module, places: Sequence[Place], parts: Sequence[Part], draft: Draft) -> LoRA:
    """draft: with all that is trained in full in it. Raises AdapterError where no configuration says what the places do."""
    sizes = {place.path: (place.rank, _alpha(place.scale, place.rank)) for place in places}
    # PEFT looks a tied head's rank up by the head's own name
    sizes |= {head: sizes[home] for head, home in draft.tied.items() if home in sizes}
    (r, alpha), _ = (Counter(sizes.values()).most_common(1) or [((LoRA.r, LoRA.alpha), 0)])[0]
    biased = any(place.bias is not None for place in places)
    attention = {place.path for place in places if place.name and is_attention(_class(model, place.path))}
    kept = list(dict.fromkeys(name for part in parts for name in part.method.modules_to_save or ()))
    _check(model, places, kept, biased)
    raw = [f"{p.path}.{p.name}" for p in places if p.name and not any(is_within(p.path, whole) for whole in attention)]
    order = sorted((part.method.bias for part in parts), key=BIASES[::-1].index)  # lora_only, all, none
    return LoRA(
        r=r,
        alpha=alpha,
        target_modules=_targets(model, [*(p.path for p in places if not p.name), *sorted(attention)]),
        bias="all" if "all" in order else order[0],
        rank_pattern={_key(path): rank for path, (rank, _) in sizes.items() if rank != r},
        alpha_pattern={_key(path): own for path, (_, own) in sizes.items() if own != alpha},
        modules_to_save=kept or None,
        lora_bias=biased,
        target_parameters=raw or None,
        trainable_token_indices={path: rows.indices.tolist() for path, rows in draft.tokens.items()} or None,
        ensure_weight_tying=any(part.ties() for part in parts),
    )


def _class(model: nn.Module, path: str) -> type:
    return plain(type(model.get_submodule(path)))


def _key(path: str) -> str:
    return f"^{re.escape(path)}"


def _alpha(scale: float, r: int) -> float:
    """The alpha with alpha / r == scale, to the last bit where there is one."""
    near = scale * r
    found = [one for one in (near, math.nextafter(near, math.inf), math.nextafter(near, 0.0)) if one / r == scale]
    alpha = found[0] if found else near
    return int(alpha) if alpha.is_integer() else alpha


def _targets(model: nn.Module, paths: list[str]) -> str | list[str]:
    """target_modules that match just `paths`: names, whole paths, or an expression where one path ends as another."""
    names = shortest_names(model, paths)
    matched = {path for path, _ in model.named_modules() if path and matches(names, path)}
    return names if matched == set(paths) else "|".join(map(re.escape, paths))


def _check(model: nn.Module, places: Sequence[Place], kept: Sequence[str], biased: bool) -> None:
    whole = find_modules(model, kept)
    for place in places:
        if any(is_within(place.path, module) for module in whole):
            raise AdapterError(
                f"one of the adapters trains {place.path} in full (modules_to_save) and another has a low-rank update there: no "
                "file holds both. Use lorakit.use(model, {...}) to have several at once."
            )
        embedding = not place.name and isinstance(low_rank_kind(_class(model, place.path)), EmbeddingKind)
        if biased and (place.name or embedding):
            raise AdapterError(
                f"one of the adapters has a lora_bias, and {place.path}, which another updates, takes none: no file holds both."
            )
