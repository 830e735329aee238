"""A PEFT folder that vLLM serves as it is.

vLLM (vllm/lora/peft_helper.py) reads r, lora_alpha, use_rslora and target_modules, and no pattern: one scaling and one
rank for all. It refuses DoRA, modules_to_save and biases.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.errors import UsageError
from lorakit.store.foreign.format import Format, Options, Written, refuse, single
from lorakit.store.foreign.hub import Adapter, Bundle, beyond_pairs, embeddings_of, key_of, number, scaling_of, sort
from lorakit.store.foreign.peft import folder_files
from lorakit.store.foreign.source import Source

DEFAULT_MAX_RANK = 16  # of vLLM's --max-lora-rank
FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Vllm(Format):
    """Written only: what vLLM takes is PEFT's, and read as that."""

    name: ClassVar[str] = "vllm"
    what: ClassVar[str] = "a PEFT folder of one rank and one scaling, as vLLM serves it"

    def recognises(self, source: Source) -> bool:
        return False

    def read(self, source: Source, options: Options) -> Bundle:
        raise UsageError("a folder for vLLM is a PEFT folder, and is read as one.")

    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """Lesser ranks are padded with zeros, which changes no product; unlike scalings go into B where that is exact."""
        adapter = single(bundle, "vLLM's folder")
        found = sort(adapter.tensors)
        faults = beyond_pairs(adapter) + embeddings_of(adapter)
        faults += [f"{path}: a convolution" for path, halves in found.pairs.items() if halves[0].dim() > 2]
        refuse("vLLM's folder", faults)
        rank = max(found.rank(path) for path in found.pairs)
        scaling = scaling_of(adapter.config, next(iter(found.pairs)), found.rank(next(iter(found.pairs))))
        tensors: dict[str, Tensor] = {}
        notes = []
        for path, halves in found.pairs.items():
            a, b = halves[0], halves[1]
            own = scaling_of(adapter.config, path, found.rank(path))
            scaled = b if own == scaling else _times(b, own / scaling, own, scaling)
            if scaled is None:
                faults.append(
                    f"{path}: its scaling {own:g} is not the others' {scaling:g}, and cannot go into lora_B exactly"
                )
                continue
            missing = rank - found.rank(path)
            tensors[key_of(path, 0)] = torch.cat([a, a.new_zeros(missing, a.shape[1])]) if missing else a
            tensors[key_of(path, 1)] = torch.cat([scaled, b.new_zeros(b.shape[0], missing)], 1) if missing else scaled
        config = _config(adapter, list(found.pairs), rank, scaling)
        if scaling_of(config, "", rank) != scaling:
            faults.append(f"the scaling {scaling:g} is no alpha / {rank} exactly")
        refuse("vLLM's folder", faults)
        if any(found.rank(path) != rank for path in found.pairs):
            notes.append(f"lesser ranks are padded with zeros to {rank}")
        if rank > DEFAULT_MAX_RANK:
            notes.append(
                f"start vLLM with --max-lora-rank {rank}, or the next that it takes (its default is {DEFAULT_MAX_RANK})"
            )
        return Written(folder_files(target, Adapter(config, tensors, {}, _without_notes(adapter.extra))), notes)


def _times(b: Tensor, factor: float, own: float, scaling: float) -> Tensor | None:
    """b * factor, None where a value or the scaling would be rounded."""
    product = b * factor
    exact = torch.equal(product.double(), b.double() * factor) and scaling * factor == own
    return product if exact and torch.equal((product.double() / factor), b.double()) else None


def _config(adapter: Adapter, paths: list[str], rank: int, scaling: float) -> dict[str, Any]:
    config = {**adapter.config, "rank_pattern": {}, "alpha_pattern": {}}
    patterned = bool(adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"))
    if patterned or rank != adapter.config.get("r"):
        config |= {"r": rank, "lora_alpha": number(scaling * rank), "use_rslora": False}
    targets = adapter.config.get("target_modules")
    plain = isinstance(targets, list) and all(re.fullmatch(r"[\w.]+", one) for one in targets)
    if not plain or any(adapter.config.get(key) for key in FILTERS):
        config |= {"target_modules": paths, **dict.fromkeys(FILTERS)}
    return config


def _without_notes(extra: dict[str, Any]) -> dict[str, Any]:
    """The way back to another format is lost where tensors are padded."""
    return {key: value for key, value in extra.items() if key != "converted"}
