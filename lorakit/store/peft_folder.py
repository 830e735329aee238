"""PEFT's tensor keys: to the pairs and replaced parameters of a draft, and back.

`base_model.model.<module>.lora_A.weight (r, in)`, `lora_B.weight (out, r)`; for an embedding `lora_embedding_A (r, vocab)`
and `lora_embedding_B (dim, r)`; `<module>.base_layer.bias` for the bias of an adapted layer; everything else that is
trained in full under its plain name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import EmbeddingKind, low_rank_kind
from lorakit.attach.method import Draft, Pair
from lorakit.methods.lora import LoRA

PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
OTHERS = ("lora_magnitude_vector", "lora_B.bias", "token_adapter", "original_module")  # features that are not read here
MAX_TENSORS = 1_000_000


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
        if len(halves) < 2:
            parsed.faults.append(f"{path}: lora_{'B' if 0 in halves else 'A'} is missing")
        elif halves[0].dim() != 2 or halves[1].dim() != 2:
            parsed.faults.append(
                f"{path}: lora_A {list(halves[0].shape)} and lora_B {list(halves[1].shape)} must be matrices"
            )
        elif halves[0].shape[0] != halves[1].shape[1]:
            parsed.faults.append(f"{path}: lora_A has rank {halves[0].shape[0]} and lora_B {halves[1].shape[1]}")
    return parsed


def _sort(parsed: Parsed, name: str, tensor: Tensor) -> None:
    for half, endings in enumerate(zip(LINEAR, EMBEDDING, strict=True)):
        for ending in endings:
            if name.endswith("." + ending):
                path = name.removesuffix("." + ending)
                parsed.pairs.setdefault(path, {})[half] = tensor
                if ending in EMBEDDING:
                    parsed.embeddings.add(path)
                return
    if any(part in name for part in OTHERS) or "lora_" in name:
        parsed.faults.append(f"{PREFIX}{name}: a kind of tensor that lorakit does not read: its effect would be lost")
    else:
        parsed.plain[name.replace(".base_layer.", ".")] = tensor


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
        tensors.update({f"{PREFIX}{inside}.{name}": tensor for name, tensor in group.items()})
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def to_draft(parsed: Parsed, method: LoRA, model: nn.Module) -> tuple[Draft, list[str]]:
    """(draft, faults): the tensors as pairs and replaced parameters of `model`, whose shapes and names they must fit."""
    draft, faults = Draft(), list(parsed.faults)
    modules = dict(model.named_modules())
    for path, halves in parsed.pairs.items():
        module = modules.get(path)
        if module is None:
            faults.append(f"{path}: the model has no such module")
        elif len(halves) == 2 and all(half.dim() == 2 for half in halves.values()):
            pair = _pair(path, halves[0], halves[1], path in parsed.embeddings, module, method, faults)
            if pair is not None:
                draft.pairs[path] = pair
    for name, tensor in parsed.plain.items():
        _replace(draft, name, tensor, modules, faults)
    return _in_order(draft, modules), faults


def _pair(
    path: str, a: Tensor, b: Tensor, embedding: bool, module: nn.Module, method: LoRA, faults: list[str]
) -> Pair | None:
    kind = low_rank_kind(plain(type(module)))
    if kind is None or isinstance(kind, EmbeddingKind) != embedding:
        faults.append(f"{path}: the file's tensors do not fit a {type(module).__name__}")
        return None
    d_in, d_out = kind.shape(module)
    r = method.rank(path)
    if tuple(a.shape) != (r, d_in) or tuple(b.shape) != (d_out, r):
        faults.append(
            f"{path}: expected lora_A {[r, d_in]} and lora_B {[d_out, r]} (rank {r} by adapter_config.json, widths by the "
            f"model), got {list(a.shape)} and {list(b.shape)}"
        )
        return None
    first = a.t().contiguous() if embedding else a.contiguous()
    return Pair(first, b.t().contiguous(), method.scaling(path), method.dropout)


def _replace(draft: Draft, name: str, tensor: Tensor, modules: dict[str, nn.Module], faults: list[str]) -> None:
    path, _, parameter = name.rpartition(".")
    own = modules[path]._parameters.get(parameter) if path in modules else None
    if own is None:
        buffer = modules[path]._buffers.get(parameter) if path in modules else None
        if buffer is None:
            faults.append(f"{name}: the model has no such parameter")
        return
    if own.shape != tensor.shape:
        faults.append(f"{name}: expected {list(own.shape)}, got {list(tensor.shape)}")
        return
    if path in draft.pairs and parameter == "weight" and own.dtype == tensor.dtype and bool((own == tensor).all()):
        return  # PEFT stores the base's own embeddings beside a pair on them
    draft.replaced.setdefault(path, {})[parameter] = tensor


def _in_order(draft: Draft, modules: Mapping[str, nn.Module]) -> Draft:
    """The draft in the model's order, whatever the file's was."""
    return Draft(
        {path: draft.pairs[path] for path in modules if path in draft.pairs},
        {path: draft.replaced[path] for path in modules if path in draft.replaced},
    )
