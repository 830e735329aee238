"""loralib's checkpoints: `<module>.lora_A`, `<module>.lora_B`, no `.weight`; heads and biases under their own names.

A file of loralib holds no alpha, and its MergedLinear (parts of a fused q,k,v) does not say which parts: alpha and
enable_lora must be told. https://github.com/microsoft/LoRA, loralib/layers.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lorakit.errors import FileError
from lorakit.store.foreign.container import tensor_file
from lorakit.store.foreign.format import Format, Options, Written, refuse, single
from lorakit.store.foreign.hub import Adapter, Bundle, alpha_of, beyond_pairs, key_of, make_config, sort
from lorakit.store.foreign.loralib_layers import from_conv, from_merged, to_conv, to_merged
from lorakit.store.foreign.plain import parameter_name, trained
from lorakit.store.foreign.source import Source

ENDINGS = (".lora_A", ".lora_B")
PARALLEL = "module."  # what DistributedDataParallel puts before every name
EMBEDDINGS = ("wte", "wpe", "embed_tokens", "word_embeddings", "position_embeddings", "shared")
CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}  # GPT-2's projections, whose weights stand as (in, out)


class Layer(NamedTuple):
    """A pair in the hub's form. alpha: of this layer. note: (kind, value) to find the way back."""

    a: Tensor
    b: Tensor
    alpha: float
    embedding: bool = False
    note: tuple[str, Any] | None = None


class Loralib(Format):
    """Linear, Embedding, MergedLinear; Conv2d where the base tells that a layer is one."""

    name: ClassVar[str] = "loralib"
    what: ClassVar[str] = "a .bin or .pt file with <module>.lora_A and .lora_B"

    def recognises(self, source: Source) -> bool:
        return any(key.endswith(ENDINGS) for key in source.tensors)

    def read(self, source: Source, options: Options) -> Bundle:
        """Raises FileError listing what is missing: alpha, enable_lora, halves; and what makes no sense."""
        prefix = PARALLEL if all(key.startswith(PARALLEL) for key in source.tensors) else ""
        named = {key.removeprefix(prefix): tensor for key, tensor in source.tensors.items()}
        pairs, plain = _apart(named)
        more = trained(plain, set(pairs))
        faults = list(more.faults)
        if options.alpha is None:
            faults.append(
                "loralib's files hold no alpha: give the one it was trained with (--alpha, 16 in loralib's GLUE examples)"
            )
        modules = options.base.component("") if options.base else {}
        layers: dict[str, Layer] = {}
        for path, halves in pairs.items():
            layer = _layer(path, halves, options, modules.get(path))
            if isinstance(layer, Layer):
                layers[path] = layer
            else:
                faults.append(f"{path}: {layer}")
        if (
            options.enable_lora
            and not any(layer.note and layer.note[0] == "merged" for layer in layers.values())
            and not faults
        ):
            faults.append("enable_lora was given, and no layer here is a fused one")
        if faults:
            raise FileError(f"{source.path} cannot be read as it is:", faults)
        return {"": _adapter(source, prefix, layers, more.keys, more.settings, named)}

    def write(self, bundle: Bundle, target: Path, options: Options) -> Written:
        """A flat file, in the layout that the source had if the adapter came from loralib."""
        adapter = single(bundle, "loralib's file")
        notes = adapter.notes if adapter.notes.get("from") == self.name else {}
        found = sort(adapter.tensors)
        faults = beyond_pairs(adapter, settings=("modules_to_save",), tensors=(".weight", ".bias"))
        faults += [f"{key}: a bias of the low-rank product" for key in found.others if key.endswith("lora_B.bias")]
        tensors: dict[str, Tensor] = {}
        alphas: dict[str, float] = {}
        for path, halves in found.pairs.items():
            written = _own_form(adapter, path, halves, notes, options)
            if isinstance(written, str):
                faults.append(f"{path}: {written}")
                continue
            tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], alphas[path] = written
        if len(set(alphas.values())) > 1:
            faults.append(f"unlike alphas: {_shown(alphas)}; loralib's file holds none, so one must do for all")
        refuse("loralib's file", faults)
        tensors |= {parameter_name(key): tensor for key, tensor in found.others.items()}
        prefix = notes.get("prefix", "")
        order = {prefix + key: tensor for key, tensor in tensors.items()}
        alpha = next(iter(alphas.values()))
        return Written(
            {target: tensor_file(target, order, wrapper=notes.get("wrapper"))},
            [f"loralib's files hold no alpha: build the layers with lora_alpha={alpha:g}"],
        )


def _apart(named: Mapping[str, Tensor]) -> tuple[dict[str, dict[int, Tensor]], list[str]]:
    """(pairs by path, names of everything else)."""
    pairs: dict[str, dict[int, Tensor]] = {}
    plain: list[str] = []
    for key, tensor in named.items():
        if key.endswith(ENDINGS):
            pairs.setdefault(key[: -len(ENDINGS[0])], {})[ENDINGS.index(key[-len(ENDINGS[0]) :])] = tensor
        else:
            plain.append(key)
    return pairs, plain


def _layer(path: str, halves: Mapping[int, Tensor], options: Options, module: nn.Module | None) -> Layer | str:
    """A pair of loralib's in the hub's form, or what is wrong with it."""
    if len(halves) < 2:
        return f"lora_{'B' if 0 in halves else 'A'} is missing"
    a, b, alpha = halves[0], halves[1], options.alpha or 0.0
    if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are no pair of loralib's"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        conv = from_conv(a, b, module)
        return conv if isinstance(conv, str) else Layer(conv.a, conv.b, alpha * conv.times, note=("conv", conv.form))
    parts = a.shape[0] // b.shape[1]
    enabled = options.enable_lora
    if enabled and sum(enabled) == parts and b.shape[0] % parts == 0:
        return Layer(a, from_merged(b, enabled), alpha * parts, note=("merged", [int(one) for one in enabled]))
    if parts > 1:
        return (
            f"{parts} parts of a fused layer are adapted; say which with enable_lora (--enable-lora 1,0,1 for q and v)"
        )
    embedding = isinstance(module, nn.Embedding) if module is not None else path.rpartition(".")[2] in EMBEDDINGS
    return Layer(a, b, alpha, embedding)


def _adapter(
    source: Source,
    prefix: str,
    layers: Mapping[str, Layer],
    plain: Mapping[str, str],
    settings: Mapping[str, Any],
    named: Mapping[str, Tensor],
) -> Adapter:
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {"from": Loralib.name, "prefix": prefix, "wrapper": source.wrapper}
    for path, layer in layers.items():
        tensors[key_of(path, 0, embedding=layer.embedding)] = layer.a
        tensors[key_of(path, 1, embedding=layer.embedding)] = layer.b
        if layer.note:
            notes.setdefault(layer.note[0], {})[path] = layer.note[1]
    tensors |= {key: named[name] for name, key in plain.items()}
    ranks = {path: int(layer.a.shape[0]) for path, layer in layers.items()}
    stored_transposed = {path.rpartition(".")[2] for path in layers} <= CONV1D
    config = make_config(
        ranks, {path: layer.alpha for path, layer in layers.items()}, fan_in_fan_out=stored_transposed, **settings
    )
    return Adapter(config, tensors, notes)


def _own_form(
    adapter: Adapter, path: str, halves: Mapping[int, Tensor], notes: Mapping[str, Any], options: Options
) -> tuple[Tensor, Tensor, float] | str:
    """(lora_A, lora_B, alpha) of loralib's layer, or why there is none."""
    a, b = halves[0], halves[1]
    rank = int(a.shape[0])
    alpha = alpha_of(adapter.config, path, rank)
    if alpha is None:
        return f"its scaling is no alpha / {rank} exactly"
    if a.dim() > 2:
        conv = to_conv(a, b, notes.get("conv", {}).get(path))
        return conv if isinstance(conv, str) else (conv.a, conv.b, alpha / conv.times)
    noted = notes.get("merged", {}).get(path)
    enabled = options.enable_lora or (tuple(bool(one) for one in noted) if noted else None)
    if enabled is None:
        return a, b, alpha
    merged = to_merged(b, enabled)
    if merged is None:
        return f"lora_B {list(b.shape)} has no blocks for the parts {','.join(str(int(one)) for one in enabled)}"
    return a, merged, alpha / sum(enabled)


def _shown(alphas: Mapping[str, float]) -> str:
    first = {alpha: path for path, alpha in reversed(list(alphas.items()))}
    return ", ".join(f"{alpha:g} ({path})" for alpha, path in first.items())
