"""PEFT's tensor keys: to the pairs and replaced parameters of a draft, and back.

`base_model.model.<module>.lora_A.weight (r, in)`, `lora_B.weight (out, r)`; for an embedding `lora_embedding_A (r, vocab)`
and `lora_embedding_B (dim, r)`; `<module>.base_layer.bias` for the bias of an adapted layer; everything else that is
trained in full under its plain name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import EmbeddingKind, low_rank_kind
from lorakit.attach.method import Draft, Pair
from lorakit.methods.lora import LoRA

PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
OTHERS = ("lora_magnitude_vector", "lora_B.bias", "token_adapter")  # features that are not read here
WRAPPED = re.compile(r"\.base_layer\.|\.modules_to_save\.[^.]+\.")  # what PEFT's wrappers add to the model's own names
UNUSED = "original_module"  # PEFT notes the base's own head beside an adapter's: it takes no part in the result


@dataclass
class Parsed:
    """A file's tensors by what they are. pairs: path -> {0: A as stored, 1: B as stored}; plain: full name -> tensor."""

    pairs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    plain: dict[str, Tensor] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def parse(tensors: Mapping[str, Tensor]) -> Parsed:
    """Sort a file's tensors; keys that are not PEFT's, halves without their other half and unlike ranks are faults."""
    parsed = Parsed()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            parsed.faults.append(f"{key}: expected a key that begins with {PREFIX!r}")
            continue
        _sort(parsed, key.removeprefix(PREFIX), tensor)
    for path, halves in parsed.pairs.items():
        fault = _pair_fault(halves)
        if fault:
            parsed.faults.append(f"{path}: {fault}")
    return parsed


def _pair_fault(halves: Mapping[int, Tensor]) -> str | None:
    if len(halves) < 2:
        return f"lora_{'B' if 0 in halves else 'A'} is missing"
    a, b = halves[0], halves[1]
    if a.dim() != 2 or b.dim() != 2:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} must be matrices"
    if a.shape[0] != b.shape[1]:
        return f"lora_A has rank {a.shape[0]} and lora_B {b.shape[1]}"
    if not a.is_floating_point() or not b.is_floating_point():
        return f"lora_A and lora_B must hold floating-point numbers, not {a.dtype} and {b.dtype}"
    return None


def _sort(parsed: Parsed, name: str, tensor: Tensor) -> None:
    for half, endings in enumerate(zip(LINEAR, EMBEDDING, strict=True)):
        for ending in endings:
            if name.endswith("." + ending):
                path = name.removesuffix("." + ending)
                if half in parsed.pairs.get(path, {}):
                    parsed.faults.append(f"{path}: has two tensors for lora_{'AB'[half]}")
                parsed.pairs.setdefault(path, {})[half] = tensor
                if ending in EMBEDDING:
                    parsed.embeddings.add(path)
                return
    if any(part in name for part in OTHERS) or "lora_" in name:
        parsed.faults.append(f"{PREFIX}{name}: a kind of tensor that lorakit does not read: its effect would be lost")
    elif UNUSED not in name.split("."):
        plain_name = WRAPPED.sub(".", name)
        if plain_name in parsed.plain and not _same(parsed.plain[plain_name], tensor):
            parsed.faults.append(f"{plain_name}: has two tensors, which differ")
        parsed.plain[plain_name] = tensor


def to_tensors(draft: Draft, model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors of a draft on `model`, on the CPU, contiguous, in their own dtype."""
    tensors: dict[str, Tensor] = {}
    for path, pair in draft.pairs.items():
        embedding = isinstance(low_rank_kind(plain(type(model.get_submodule(path)))), EmbeddingKind)
        names = EMBEDDING if embedding else LINEAR
        tensors[f"{PREFIX}{path}.{names[0]}"] = pair.A.t() if embedding else pair.A
        tensors[f"{PREFIX}{path}.{names[1]}"] = pair.Bt.t()
    for path, group in draft.replaced.items():
        inside = f"{path}.base_layer" if path in draft.pairs else path
        tensors.update({f"{PREFIX}{inside}{'.' if inside else ''}{name}": tensor for name, tensor in group.items()})
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def to_draft(parsed: Parsed, method: LoRA, modules: Mapping[str, nn.Module]) -> tuple[Draft, list[str]]:
    """(draft, faults): the tensors as pairs and replaced parameters of a model, whose shapes and names they must fit.

    modules: the model's, by path. Faults that `parse` and the configuration told already are not told again.
    """
    draft, faults = Draft(), []
    for path, halves in parsed.pairs.items():
        module = modules.get(path)
        if module is None:
            faults.append(f"{path}: the model has no such module")
        elif _pair_fault(halves) is None:
            pair = _pair(path, halves[0], halves[1], path in parsed.embeddings, module, method, faults)
            if pair is not None:
                draft.pairs[path] = pair
    for name, tensor in parsed.plain.items():
        path, _, parameter = name.rpartition(".")
        fault = _replace(draft, path, parameter, tensor, modules.get(path))
        if fault:
            faults.append(f"{name}: {fault}")
    return _in_order(draft, modules), faults


def _pair(
    path: str, a: Tensor, b: Tensor, embedding: bool, module: nn.Module, method: LoRA, faults: list[str]
) -> Pair | None:
    kind = low_rank_kind(plain(type(module)))
    if kind is None or isinstance(kind, EmbeddingKind) != embedding:
        faults.append(f"{path}: the file's tensors do not fit a {plain(type(module)).__name__}")
        return None
    d_in, d_out = kind.shape(module)
    if a.shape[1] != d_in or b.shape[0] != d_out:
        faults.append(
            f"{path}: the model's layer is {d_in} -> {d_out} wide, but lora_A is {list(a.shape)} and lora_B {list(b.shape)}"
        )
        return None
    first = a.t().contiguous() if embedding else a.contiguous()
    return Pair(first, b.t().contiguous(), method.scaling(path), method.dropout)


def _replace(draft: Draft, path: str, name: str, tensor: Tensor, module: nn.Module | None) -> str | None:
    """Note a tensor that stands for a parameter of the base; returns what is wrong with it."""
    own = None if module is None else module._parameters.get(name)
    if own is None:
        buffer = None if module is None else module._buffers.get(name)
        if buffer is None:
            return "the model has no such parameter"
        return None if _same(buffer, tensor) else "differs from the model's buffer, which an adapter cannot replace"
    if own.shape != tensor.shape:
        return f"expected {list(own.shape)}, got {list(tensor.shape)}"
    if own.is_floating_point() and not tensor.is_floating_point():
        return f"expected floating-point numbers, got {tensor.dtype}"
    if path in draft.pairs and name == "weight" and _same(own, tensor):
        return None  # PEFT stores the base's own embeddings beside a pair on them
    draft.replaced.setdefault(path, {})[name] = tensor
    return None


def _same(own: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors hold the same values, one of them perhaps as a copy in a narrower type."""
    tensor = tensor.to(own.device)
    return own.shape == tensor.shape and (
        torch.equal(own, tensor.to(own.dtype)) or torch.equal(own.to(tensor.dtype), tensor)
    )


def _in_order(draft: Draft, modules: Mapping[str, nn.Module]) -> Draft:
    """The draft in the model's order, whatever the file's was."""
    return Draft(
        {path: draft.pairs[path] for path in modules if path in draft.pairs},
        {path: draft.replaced[path] for path in modules if path in draft.replaced},
    )
