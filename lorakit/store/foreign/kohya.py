"""kohya's files (sd-scripts, every web UI): `lora_unet_<path, _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Underscores hide where a path's dots were. For Stable Diffusion's U-Nets and CLIP diffusers' converter knows; for any other
model its module names do (options.base).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor

from lorakit.errors import FileError, UsageError
from lorakit.store.foreign.components import COMPONENTS, filed, named
from lorakit.store.foreign.container import tensor_file
from lorakit.store.foreign.diffusers import alpha_tensor, rename
from lorakit.store.foreign.format import Format, Options, Written, names_from, refuse
from lorakit.store.foreign.hub import (
    Adapter,
    Bundle,
    beyond_pairs,
    embeddings_of,
    key_of,
    make_config,
    plain_alphas,
    sort,
)
from lorakit.store.foreign.source import Source

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
PREFIXES = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lora_transformer_": "transformer",
}  # fmt: skip
SGM = ("input_blocks", "middle_block", "output_blocks")  # the original Stable Diffusion XL names
LAYERS_PER_BLOCK = 2  # of Stable Diffusion XL
# Every word of a path in Stable Diffusion's U-Nets and in CLIP: a path that has others was split at a wrong place.
WORDS = {
    "down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers", "transformer_blocks",
    "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in", "proj_out", "conv", "conv1", "conv2",
    "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2",
    "text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
    "text_projection",
}  # fmt: skip


class Kohya(Format):
    """Pairs and alphas of a diffusion pipeline, nothing else."""

    name: ClassVar[str] = "kohya"
    what: ClassVar[str] = "a file with lora_unet_..., lora_te_... keys"

    def recognises(self, source: Source) -> bool:
        return any(key.startswith(tuple(PREFIXES)) and key.endswith(DOWN) for key in source.tensors)

    def read(self, source: Source, options: Options) -> Bundle:
        """An adapter a component. A pair without an alpha has the scaling 1. Raises FileError on names that stay unclear."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in source.tensors.items():
            layer, _, ending = key.partition(".")
            layers.setdefault(layer, {})[ending] = tensor
        faults = [fault for layer, parts in layers.items() for fault in _layer_faults(layer, parts)]
        if faults:
            raise FileError(f"{source.path} holds what lorakit cannot carry over exactly:", faults)
        paths, faults = _paths(layers, options)
        if faults:
            raise FileError(
                f"{source.path} has names whose dots cannot be told; give the model (--base FOLDER):", faults
            )
        grouped: dict[str, dict[str, dict[str, Tensor]]] = {}
        for layer, parts in layers.items():
            grouped.setdefault(_component(layer), {})[layer] = parts
        if options.component and len(grouped) == 1:  # lora_unet_ stands for other denoisers too
            grouped = {options.component: next(iter(grouped.values()))}
        return {component: _read_part(component, part, paths) for component, part in grouped.items()}

    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """One file with an alpha for every pair."""
        refuse("kohya's file", [fault for one in bundle.values() for fault in beyond_pairs(one) + embeddings_of(one)])
        parts = named(bundle, options.component)
        tensors: dict[str, Tensor] = {}
        faults: list[str] = []
        for component, adapter in parts.items():
            prefix = _prefix(component, parts)
            if not prefix:
                faults.append(f"{component}: kohya's files have no name for it")
            else:
                _add(tensors, adapter, component, prefix, faults)
        refuse("kohya's file", faults)
        return Written({target: tensor_file(target, tensors)})


def _component(layer: str) -> str:
    return next((component for prefix, component in PREFIXES.items() if layer.startswith(prefix)), "")


def _prefix(component: str, parts: Iterable[str]) -> str:
    if component in ("unet", "transformer"):
        return "lora_unet_"
    if component == "text_encoder":
        return "lora_te1_" if "text_encoder_2" in parts else "lora_te_"
    return {"text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}.get(component, "")


def _layer_faults(layer: str, parts: Mapping[str, Tensor]) -> list[str]:
    if not _component(layer):
        return [f"{layer}: expected a name that begins with {', '.join(PREFIXES)}"]
    faults = [f"{layer}.{ending}: {_foreign(ending)}" for ending in parts if ending not in (DOWN, UP, ALPHA)]
    faults += [f"{layer}.{ending}: missing" for ending in (DOWN, UP) if ending not in parts and not faults]
    if ALPHA in parts and (parts[ALPHA].numel() != 1 or parts[ALPHA].is_complex()):
        faults.append(f"{layer}.{ALPHA}: no single number")
    return faults


def _foreign(ending: str) -> str:
    if ending == "dora_scale":
        return "DoRA in LyCORIS' form, whose norm runs along another axis than PEFT's"
    if ending.startswith(("hada_", "lokr_", "oft_", "lora_mid")):
        return "LyCORIS: no product of two matrices"
    return "no tensor of a LoRA"


def _paths(layers: Mapping[str, Any], options: Options) -> tuple[dict[str, str], list[str]]:
    """(module path by kohya's layer name, faults): by the base's module names where there is one."""
    if options.base is None:
        return _by_converter(list(layers))
    tables: dict[str, dict[str, list[str]]] = {}
    paths, faults = {}, []
    for layer in layers:
        component = options.component or _component(layer)
        if component not in tables:
            tables[component] = {}
            for path in options.base.component(component):
                for one in {path, filed(path, component)}:
                    tables[component].setdefault(one.replace(".", "_"), []).append(path)
        hits = tables[component].get(_rest(layer), [])
        if len(hits) == 1:
            paths[layer] = hits[0]
        else:
            faults.append(f"{layer}: {'the model has no such module' if not hits else 'could be ' + ' or '.join(hits)}")
    return paths, faults


def _rest(layer: str) -> str:
    return layer[len(next(prefix for prefix in PREFIXES if layer.startswith(prefix))) :]


def _by_converter(layers: list[str]) -> tuple[dict[str, str], list[str]]:
    """By diffusers' converter, which is made for Stable Diffusion: what it gives must be made of that model's own words."""
    try:
        from diffusers.loaders import lora_conversion_utils

        utils: Any = lora_conversion_utils
    except ImportError as error:
        raise UsageError('files of diffusers and kohya need diffusers: pip install "lorakit[diffusion]"') from error
    # the converters move values and never look at them: the layers' names go through in place of tensors
    keys: dict[str, Any] = {f"{layer}.{ending}": layer for layer in layers for ending in (DOWN, UP)}
    try:
        if any(word in key for key in keys for word in SGM):
            keys = utils._maybe_map_sgm_blocks_to_diffusers(keys, SimpleNamespace(layers_per_block=LAYERS_PER_BLOCK))
        converted, _ = utils._convert_non_diffusers_lora_to_diffusers(keys)
    except (ValueError, KeyError, IndexError) as error:
        return {}, [f"diffusers' converter gives up: {str(error).strip()[:300]}"]
    paths: dict[str, str] = {}
    for component in COMPONENTS:
        part = {
            key.removeprefix(f"{component}."): layer
            for key, layer in converted.items()
            if key.startswith(f"{component}.")
        }
        renamed, _ = rename(list(part), component)
        paths |= {part[key]: re.sub(r"\.lora_[AB]\.weight$", "", name) for key, name in renamed.items()}
    missing = [layer for layer in layers if not _sound(paths.get(layer, ""))]
    return paths, [f"{layer}{': read as ' + paths[layer] if layer in paths else ''}" for layer in missing]


def _sound(path: str) -> bool:
    return bool(path) and all(word.isdigit() or word in WORDS for word in path.split("."))


def _read_part(component: str, layers: Mapping[str, Mapping[str, Tensor]], paths: Mapping[str, str]) -> Adapter:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    notes: dict[str, Any] = {"from": Kohya.name, "component": component, "names": {}, "alphas": {}}
    for layer, parts in layers.items():
        path = paths[layer]
        tensors[key_of(path, 0)], tensors[key_of(path, 1)] = parts[DOWN], parts[UP]
        ranks[path] = int(parts[DOWN].shape[0]) if parts[DOWN].dim() else 0
        alphas[path] = float(parts[ALPHA]) if ALPHA in parts else float(ranks[path])
        if layer != _canonical(path, component):
            notes["names"][path] = layer
        noted = [str(parts[ALPHA].dtype), parts[ALPHA].dim()] if ALPHA in parts else None
        if noted != [str(parts[DOWN].dtype), 0]:
            notes["alphas"][path] = noted
    return Adapter(make_config(ranks, alphas), tensors, {key: value for key, value in notes.items() if value})


def _canonical(path: str, component: str) -> str:
    prefix = "lora_te_" if component == "text_encoder" else _prefix(component, ())
    return prefix + filed(path, component).replace(".", "_")


def _add(tensors: dict[str, Tensor], adapter: Adapter, component: str, prefix: str, faults: list[str]) -> None:
    """One component's tensors into the file's."""
    ours = adapter.notes.get("from") == Kohya.name
    names = names_from(adapter, Kohya.name)
    noted = adapter.notes.get("alphas", {}) if ours else {}
    if ours:  # a lone text encoder may have come from a file with two
        prefix = {"text_encoder": "lora_te_"}.get(component, prefix)
    alphas, more = plain_alphas(adapter)
    faults += more
    for path, halves in sort(adapter.tensors).pairs.items():
        layer = names.get(path) or prefix + filed(path, component).replace(".", "_")
        if f"{layer}.{DOWN}" in tensors:
            faults.append(f"{path}: its name without dots, {layer}, is another module's too")
        tensors[f"{layer}.{DOWN}"], tensors[f"{layer}.{UP}"] = halves[0], halves[1]
        said = noted.get(path, [str(halves[0].dtype), 0])
        if said is None and alphas.get(path) == halves[0].shape[0]:
            continue
        alpha = _alpha(alphas.get(path, 0.0), said or ["torch.float32", 0])
        if alpha is None:
            faults.append(f"{path}: no alpha of float32 is exactly {alphas.get(path)}")
        else:
            tensors[f"{layer}.{ALPHA}"] = alpha


def _alpha(value: float, said: list[Any]) -> Tensor | None:
    own = alpha_tensor(value, said[0], said[1])
    return alpha_tensor(value, "float32") if own is None else own
