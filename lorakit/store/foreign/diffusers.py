"""diffusers' pytorch_lora_weights.safetensors, all its generations: old attention processors' keys, lora.down/up,
lora_linear_layer.down/up, PEFT's own names, `.alpha` tensors and the lora_adapter_metadata header.

Names are translated by diffusers' own converters (diffusers/utils/state_dict_utils.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.errors import FileError, UsageError
from lorakit.store.foreign.components import CLIP, COMPONENTS, built, filed, guess, is_text, named
from lorakit.store.foreign.container import PICKLES, tensor_file
from lorakit.store.foreign.format import Format, Options, Written, names_from, refuse
from lorakit.store.foreign.hub import (
    Adapter,
    Bundle,
    alpha_of,
    beyond_pairs,
    embeddings_of,
    make_config,
    scaling_of,
    sort,
    split,
)
from lorakit.store.foreign.source import DIFFUSERS, Source
from lorakit.store.peft_config import DEFAULTS
from lorakit.store.peft_folder import LINEAR, MAGNITUDE, PREFIX

METADATA = "lora_adapter_metadata"
BIAS = "lora_B.bias"
OLD = (".lora.down.weight", ".lora.up.weight", "_lora.down.weight", "_lora.up.weight", ".lora_linear_layer.down.weight")
ENDS = tuple(f".{one}" for one in LINEAR)
NOT_SAID = ("peft_type", "inference_mode", "auto_mapping", "base_model_name_or_path")


class Diffusers(Format):
    """What `pipeline.load_lora_weights` takes: a pipeline's components in one file."""

    name: ClassVar[str] = "diffusers"
    what: ClassVar[str] = f"{DIFFUSERS[0]} with unet., transformer., text_encoder. keys"

    def recognises(self, source: Source) -> bool:
        return any(
            _component(key) or key.endswith((*OLD, *ENDS)) for key in source.tensors if "lora" in key
        ) and not any(key.startswith("lora_") for key in source.tensors)

    def read(self, source: Source, options: Options) -> Bundle:
        """An adapter a component. Without alphas and metadata the scaling is 1: diffusers adds B A as it is."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in source.tensors.items():
            parts.setdefault(_component(key), {})[key] = tensor
        metadata = _metadata(source)
        bundle, faults = {}, []
        for component, tensors in parts.items():
            known = component or options.component or guess(tensors) or "unet"
            modules = options.base.component(known) if options.base else {}
            adapter, more = _read_part(component, known, tensors, metadata.get(component, {}), modules)
            faults += more
            bundle[component] = adapter
        if "" in bundle and len(bundle) > 1:
            faults.append("some keys name a component and some do not")
        if faults:
            raise FileError(f"{source.path} cannot be read as diffusers' file:", faults)
        return bundle

    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """One file. A scaling other than 1 goes into the header."""
        target = target if target.suffix in (".safetensors", *PICKLES) else target / DIFFUSERS[0]
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, Any] = {}
        faults: list[str] = []
        for component, adapter in named(bundle, options.component).items():
            faults += beyond_pairs(adapter, settings=("use_dora", "lora_bias"), tensors=(MAGNITUDE, BIAS))
            faults += embeddings_of(adapter)
            if component not in COMPONENTS:
                faults.append(f"{component}: no component of a pipeline (one of {', '.join(COMPONENTS)})")
            names = names_from(adapter, self.name)
            tensors |= {names.get(key) or _own(key, component): tensor for key, tensor in adapter.tensors.items()}
            tensors |= _alpha_tensors(adapter, faults)
            if _needs_metadata(adapter):
                metadata |= {f"{component}.{key}": value for key, value in _said(adapter.config, component).items()}
        if metadata and target.suffix != ".safetensors":
            faults.append(f"{target.name}: a scaling other than 1 stands in the header of a .safetensors file alone")
        refuse("diffusers' file", faults)
        header = {METADATA: json.dumps(metadata, indent=2, sort_keys=True)} if metadata else {}
        note = f"the scaling stands in the header ({METADATA}), which old versions of diffusers ignore"
        return Written({target: tensor_file(target, tensors, header)}, [note] if metadata else [])


def _component(key: str) -> str:
    first = key.partition(".")[0]
    return first if first in COMPONENTS else ""


def _metadata(source: Source) -> dict[str, dict[str, Any]]:
    """component -> PEFT's settings of it, from the header."""
    if METADATA not in source.metadata:
        return {}
    try:
        raw = json.loads(source.metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source.path}: {METADATA} in its header is no JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise FileError(f"{source.path}: {METADATA} in its header is no JSON object.")
    found: dict[str, dict[str, Any]] = {}
    for key, value in raw.items():
        component = _component(key)
        found.setdefault(component, {})[key.removeprefix(f"{component}.") if component else key] = value
    return found


def _read_part(
    component: str, known: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any], modules: Mapping[str, Any]
) -> tuple[Adapter, list[str]]:
    """One component's adapter. known: what it is for, where its keys do not name it. said: its metadata."""
    short = {key.removeprefix(f"{component}.") if component else key: key for key in tensors}
    alphas = {key: source for key, source in short.items() if key.endswith(".alpha")}
    renamed, faults = rename([key for key in short if key not in alphas], known)
    hub: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, new in renamed.items():
        path, ending = _apart(new)
        if ending is None:
            faults.append(f"{short[key]}: no tensor of a LoRA")
            continue
        name = f"{PREFIX}{built(path, known, modules)}.{ending}"
        if name in hub:
            faults.append(f"{short[key]}: a second tensor for {name}")
        hub[name] = tensors[short[key]]
        names[name] = short[key]
    found = sort(hub)
    faults += [f"{path}: one half of its pair is missing" for path, halves in found.pairs.items() if len(halves) < 2]
    ranks = {path: found.rank(path) for path, halves in found.pairs.items() if 0 in halves}
    values, noted, more = _alphas(alphas, tensors, ranks, known, modules)
    faults += more + ([] if ranks else [f"{component or 'the file'}: no pair of LoRA tensors"])
    if said and alphas:
        faults.append(f"{component or 'the file'}: has alphas and {METADATA}, which could say different things")
    if faults:
        return Adapter({}, {}), faults
    notes = {"from": Diffusers.name, "component": known, "metadata": bool(said), "alphas": noted}
    notes["names"] = {key: name for key, name in names.items() if name != _own(key, known)}
    return Adapter(_config(said, ranks, values, found.others), hub, notes), []


def _config(
    said: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float], others: Mapping[str, Tensor]
) -> dict[str, Any]:
    if said:
        return {**DEFAULTS, **said, "peft_type": "LORA", "inference_mode": True}
    return make_config(
        ranks,
        {path: alphas.get(path, float(rank)) for path, rank in ranks.items()},
        use_dora=any(key.endswith(MAGNITUDE) for key in others),
        lora_bias=any(key.endswith(BIAS) for key in others),
    )


def _apart(name: str) -> tuple[str, str | None]:
    """(module path, the hub's ending) of a converted name."""
    for ending in (*LINEAR, BIAS, MAGNITUDE):
        if name.endswith("." + ending):
            return name[: -len(ending) - 1], ending
    if name.endswith(f".{MAGNITUDE}.weight"):
        return name.removesuffix(f".{MAGNITUDE}.weight"), MAGNITUDE
    return name, None


def rename(keys: list[str], component: str) -> tuple[dict[str, str], list[str]]:
    """Keys of one component in PEFT's names, by diffusers' converters: (key -> name, faults). `component` "" is a U-Net."""
    converters = _converters()
    named_: dict[str, str] = {}  # the converters move values and never look at them
    if is_text(component):
        kinds = converters.StateDictType
        for kind in (kinds.DIFFUSERS_OLD, kinds.DIFFUSERS):
            part = {key: key for key in keys if ("_lora." in key) == (kind == kinds.DIFFUSERS_OLD)}
            named_ |= converters.convert_state_dict_to_peft(part, original_type=kind)
    else:
        named_ = converters.convert_unet_state_dict_to_peft({key: key for key in keys})
    if len(named_) != len(keys):
        return {}, [f"{component or 'the file'}: two of its keys mean the same tensor"]
    return {key: name for name, key in named_.items()}, []


def _converters() -> Any:
    try:
        from diffusers.utils import state_dict_utils
    except ImportError as error:
        raise UsageError('files of diffusers and kohya need diffusers: pip install "lorakit[diffusion]"') from error
    return state_dict_utils


def _alphas(
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    component: str,
    modules: Mapping[str, Any],
) -> tuple[dict[str, float], dict[str, list[str]], list[str]]:
    """(alpha by path, path -> [its key, its dtype], faults) from `.alpha` tensors."""
    values, noted, faults = {}, {}, []
    for key, source in keys.items():
        stem = key.removesuffix(".alpha").removesuffix(".lora")
        candidates = [stem] + [f"{_apart(new)[0]}" for new in rename([f"{stem}.down.weight"], component)[0].values()]
        path = next((one for one in (built(c, component, modules) for c in candidates) if one in ranks), None)
        if path is None or tensors[source].numel() != 1 or tensors[source].is_complex():
            faults.append(f"{source}: an alpha of no pair" if path is None else f"{source}: no single number")
            continue
        values[path] = float(tensors[source])
        noted[path] = [source, str(tensors[source].dtype), str(tensors[source].dim())]
    return values, noted, faults


def alpha_tensor(value: float, dtype: str, dim: int = 0) -> Tensor | None:
    """An alpha of a dtype, None where it would be rounded."""
    kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
    tensor = torch.tensor(value, dtype=torch.float64).to(kind)
    return tensor.reshape([1] * dim) if float(tensor) == value else None


def _alpha_tensors(adapter: Adapter, faults: list[str]) -> dict[str, Tensor]:
    """The `.alpha` tensors of a file that came with them."""
    if adapter.notes.get("from") != Diffusers.name:
        return {}
    found, written = sort(adapter.tensors), {}
    for path, (key, dtype, dim) in adapter.notes.get("alphas", {}).items():
        alpha = alpha_of(adapter.config, path, found.rank(path)) if path in found.pairs else None
        tensor = None if alpha is None else alpha_tensor(alpha, dtype, int(dim))
        if tensor is None:
            faults.append(f"{path}: its scaling is no alpha of {dtype}")
        else:
            written[key] = tensor
    return written


def _needs_metadata(adapter: Adapter) -> bool:
    if adapter.notes.get("from") == Diffusers.name:
        if adapter.notes.get("alphas"):
            return False
        if adapter.notes.get("metadata"):
            return True
    found = sort(adapter.tensors)
    return any(scaling_of(adapter.config, path, found.rank(path)) != 1 for path in found.pairs)


def _said(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The settings that say something, as keywords of PEFT's LoraConfig."""
    said = {
        key: value
        for key, value in config.items()
        if key in DEFAULTS and key not in NOT_SAID and (value != DEFAULTS[key] or key in ("r", "lora_alpha"))
    }
    if not is_text(component):
        return said
    for key in (
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
    ):  # an ending fits the model with text_model and without
        value = said.get(key)
        if isinstance(value, list):
            said[key] = [one.removeprefix(CLIP) for one in value]
        elif isinstance(value, dict):
            said[key] = {one.removeprefix(CLIP): number for one, number in value.items()}
    return said


def _own(key: str, component: str) -> str:
    """The name that we write: PEFT's, and lora_linear_layer's for a text encoder, as every version of diffusers reads."""
    path, half, _ = split(key)
    if half is None:
        return f"{component}.{filed(path, component)}"
    ending = LINEAR[half]
    if is_text(component):
        ending = f"lora_linear_layer.{('down', 'up')[half]}.weight"
    return f"{component}.{filed(path, component)}.{ending}"
