"""PEFT's tensor keys: to the pairs and replaced parameters of a draft, and back.

`base_model.model.<module>.lora_A.weight (r, in)`, `lora_B.weight (out, r)`; a convolution's are (r, in, *kernel), dense over
its groups, and (out, r / groups, 1, ...); for an embedding `lora_embedding_A (r, vocab)` and `lora_embedding_B (dim, r)`;
`lora_B.bias`, `lora_magnitude_vector` (DoRA); `<module>.base_layer.bias` for the bias of an adapted layer;
`token_adapter.trainable_tokens_delta` for rows of an embedding; everything else that is trained in full under its plain
name. Raw parameters: see lorakit.store.peft_raw.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import ConvKind, EmbeddingKind, LeafKind, low_rank_kind
from lorakit.attach.method import Draft, Pair
from lorakit.errors import LorakitError
from lorakit.methods.lora import LoRA
from lorakit.methods.start import Starter, rows_at, tie, tie_rows
from lorakit.store.peft_raw import raw_draft, raw_tensors

PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE, BIAS, TOKENS = "lora_magnitude_vector", "lora_B.bias", "token_adapter.trainable_tokens_delta"
WRAPPED = re.compile(r"\.base_layer\.|\.modules_to_save\.[^.]+\.")  # what PEFT's wrappers add to the model's own names
UNUSED = "original_module"  # PEFT notes the base's own head beside an adapter's: it takes no part in the result


@dataclass
class Parsed:
    """A file's tensors by what they are. pairs: path -> {0: A as stored, 1: B as stored}; plain: full name -> tensor.

    magnitudes, biases, tokens: path -> what stands beside a pair there, or in place of an embedding's rows.
    """

    pairs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    plain: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
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
    for name, group in ((MAGNITUDE, parsed.magnitudes), (BIAS, parsed.biases)):
        parsed.faults += [
            f"{path}.{name}: stands alone, without lora_A and lora_B" for path in group if path not in parsed.pairs
        ]
    return parsed


def _pair_fault(halves: Mapping[int, Tensor]) -> str | None:
    if len(halves) < 2:
        return f"lora_{'B' if 0 in halves else 'A'} is missing"
    a, b = halves[0], halves[1]
    if not 2 <= a.dim() == b.dim() <= 5:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} must be matrices, or kernels of one convolution"
    if a.dim() > 2 and (any(side != 1 for side in b.shape[2:]) or b.shape[1] == 0 or a.shape[0] % b.shape[1]):
        return f"lora_A has rank {a.shape[0]} and lora_B {list(b.shape)}: expected (out, rank / groups, 1, ...)"
    if a.dim() == 2 and a.shape[0] != b.shape[1]:
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
    for ending, group in ((MAGNITUDE, parsed.magnitudes), (BIAS, parsed.biases), (TOKENS, parsed.tokens)):
        for full in (f".{ending}", f".{ending}.weight"):  # older versions of PEFT wrote the magnitude with .weight
            if name.endswith(full):
                group[name.removesuffix(full)] = tensor
                return
    if "lora_" in name or "token_adapter" in name:
        parsed.faults.append(f"{PREFIX}{name}: a kind of tensor that lorakit does not read: its effect would be lost")
    elif UNUSED not in name.split("."):
        plain_name = WRAPPED.sub(".", name)
        if plain_name in parsed.plain and not _same(parsed.plain[plain_name], tensor):
            parsed.faults.append(f"{plain_name}: has two tensors, which differ")
        parsed.plain[plain_name] = tensor


def to_tensors(draft: Draft, model: nn.Module, method: LoRA) -> dict[str, Tensor]:
    """The file's tensors of a draft of `method` on `model`, on the CPU, contiguous, in their own dtype."""
    tensors: dict[str, Tensor] = {}
    for path, pair in draft.pairs.items():
        leaf = model.get_submodule(path)
        tensors |= {f"{path}.{name}": tensor for name, tensor in _stored(pair, leaf).items()}
    for head, path in draft.tied.items():
        if path in draft.pairs:  # PEFT writes the embedding's pair again as the head sees it
            a, bt = draft.pairs[path].factors()
            embedding = isinstance(low_rank_kind(plain(type(model.get_submodule(head)))), EmbeddingKind)
            names, first, second = (EMBEDDING, a.t(), bt.t()) if embedding else (LINEAR, bt, a)
            tensors |= {f"{head}.{names[0]}": first, f"{head}.{names[1]}": second}
    tensors |= raw_tensors(draft)
    for path, rows in draft.tokens.items():
        asked = torch.tensor(method.token_indices(path), device=rows.indices.device)  # in the order that the file names
        tensors[f"{path}.{TOKENS}"] = rows.rows[torch.searchsorted(rows.indices, asked)]
    for path, group in draft.replaced.items():
        inside = f"{path}.base_layer" if path in draft.pairs else path
        for name, tensor in group.items():
            tensors[f"{inside}{'.' if inside else ''}{name}"] = tensor
    return {f"{PREFIX}{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def _stored(pair: Pair, leaf: nn.Module) -> dict[str, Tensor]:
    """A layer's tensors as the file has them."""
    kind = low_rank_kind(plain(type(leaf)))
    a, bt = pair.factors()
    if isinstance(kind, EmbeddingKind):
        found = {EMBEDDING[0]: a.t(), EMBEDDING[1]: bt.t()}
    elif isinstance(kind, ConvKind):
        found = {LINEAR[0]: _dense(a, leaf), LINEAR[1]: bt.t()[(..., *[None] * kind.dimensions)]}
    else:
        found = {LINEAR[0]: a, LINEAR[1]: bt.t()}
    if pair.bias is not None:
        found[BIAS] = pair.bias
    if pair.magnitude is not None:
        shape = (1, -1, *[1] * kind.dimensions) if isinstance(kind, ConvKind) else (-1,)
        found[MAGNITUDE] = pair.magnitude.view(shape)
    return found


def _dense(a: Tensor, leaf: Any) -> Tensor:
    """A grouped convolution's A, (r, in / groups, ...), with zeros for the inputs of other groups: PEFT's shape."""
    groups: int = leaf.groups
    if groups == 1 or a.shape[1] == leaf.in_channels:
        return a
    per = a.shape[0] // groups
    dense = a.new_zeros(a.shape[0], leaf.in_channels, *a.shape[2:])
    for group in range(groups):
        rows = slice(group * per, (group + 1) * per)
        dense[rows, group * a.shape[1] : (group + 1) * a.shape[1]] = a[rows]
    return dense


def _grouped(a: Tensor, leaf: Any) -> Tensor:
    """The opposite of `_dense`, where no row reaches into another group; else A as it is."""
    groups: int = leaf.groups
    if groups == 1 or a.shape[1] != leaf.in_channels or a.shape[0] % groups:
        return a
    width, per = a.shape[1] // groups, a.shape[0] // groups
    blocks = a.view(groups, per, groups, width, *a.shape[2:])
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if blocks.count_nonzero() != own.count_nonzero():
        return a
    return own.reshape(a.shape[0], width, *a.shape[2:])


def to_draft(
    parsed: Parsed, method: LoRA, model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[Draft, list[str]]:
    """(draft, faults): the tensors as pairs and replaced parameters of a model, whose shapes and names they must fit.

    modules: the model's, by path. Faults that `parse` and the configuration told already are not told again.
    """
    draft, faults = Draft(), list[str]()
    raw, taken = raw_draft(parsed.pairs, method, model, modules, faults)
    draft.raw = raw
    starter = Starter(None, None, method)
    for path, halves in parsed.pairs.items():
        module = modules.get(path)
        if path in taken:
            continue
        if module is None:
            faults.append(f"{path}: the model has no such module")
        elif _pair_fault(halves) is None:
            pair = _pair(path, parsed, module, starter, faults)
            if pair is not None:
                draft.pairs[path] = pair
    for path, rows in parsed.tokens.items():
        fault = _token_rows(draft, path, rows, method, modules.get(path))
        if fault:
            faults.append(f"{path}: {fault}")
    for name, tensor in parsed.plain.items():
        path, _, parameter = name.rpartition(".")
        fault = _replace(draft, path, parameter, tensor, modules.get(path))
        if fault:
            faults.append(f"{name}: {fault}")
    draft = _in_order(draft, modules)
    tie_rows(draft, model)
    if method.ensure_weight_tying:
        _drop_tied(draft, model, faults)
    return draft, faults


def _drop_tied(draft: Draft, model: nn.Module, faults: list[str]) -> None:
    """Tie heads to their embeddings; a head's own pair in the file must be its embedding's, seen from the other side."""
    own = dict(draft.pairs)
    whole = {f"{path}.{name}": tensor for path, group in draft.replaced.items() for name, tensor in group.items()}
    try:
        tie(draft, model)
    except LorakitError as error:
        faults.append(str(error))
    for full, tensor in whole.items():
        path, _, name = full.rpartition(".")
        if not torch.equal(draft.replaced[path][name], tensor):
            faults.append(f"{full}: says that it is tied (ensure_weight_tying), and differs from what it is tied to")
    for head, path in draft.tied.items():
        pair, home = own.get(head), own.get(path)
        if pair is None or home is None:
            continue
        seen = (home.A, home.Bt) if pair.A.shape == home.A.shape else (home.Bt, home.A.t())
        if not (torch.equal(pair.A, seen[0]) and torch.equal(pair.Bt, seen[1])):
            faults.append(f"{head}: says that it is tied to {path} (ensure_weight_tying), and has another pair")


def _token_rows(draft: Draft, path: str, rows: Tensor, method: LoRA, module: nn.Module | None) -> str | None:
    """Note rows of an embedding; returns what is wrong with them."""
    weight = None if module is None else module._parameters.get("weight")
    if module is None or weight is None or not isinstance(low_rank_kind(plain(type(module))), EmbeddingKind):
        return "the model has no such embedding, whose rows the file replaces"
    indices = method.token_indices(path)
    if indices is None:
        return "its rows are in the file, but trainable_token_indices does not say which"
    if rows.shape != (len(indices), weight.shape[1]):
        return f"expected {len(indices)} rows of {weight.shape[1]} numbers, got {list(rows.shape)}"
    if any(not 0 <= index < weight.shape[0] for index in indices):
        return f"trainable_token_indices names rows beyond the model's {weight.shape[0]}"
    draft.tokens[path] = rows_at(indices, rows)
    return None


def _pair(path: str, parsed: Parsed, module: nn.Module, starter: Starter, faults: list[str]) -> Pair | None:
    a, b = parsed.pairs[path][0], parsed.pairs[path][1]
    kind, embedding = low_rank_kind(plain(type(module))), path in parsed.embeddings
    if kind is None or isinstance(kind, EmbeddingKind) != embedding:
        faults.append(f"{path}: the file's tensors do not fit a {plain(type(module)).__name__}")
        return None
    fault = _shape_fault(kind, module, a, b)
    if fault:
        faults.append(f"{path}: {fault}")
        return None
    if embedding:
        first, second = a.t(), b.t()
    elif isinstance(kind, ConvKind):
        first, second = _grouped(a, module), b.flatten(1).t()
    else:
        first, second = a, b.t()
    pair = Pair(first, second, starter.method.scaling(path), starter.method.dropout)
    wrong = _beside(path, pair, parsed, kind.shape(module)[1])
    try:
        starter.fix(path, module, kind, pair)
    except LorakitError as error:
        wrong.append(str(error))
    faults += wrong
    return None if wrong else pair


def _beside(path: str, pair: Pair, parsed: Parsed, width: int) -> list[str]:
    """Put the magnitude and the bias that the file has for a pair beside it; returns what is wrong with them."""
    wrong = []
    for name, group in ((MAGNITUDE, parsed.magnitudes), (BIAS, parsed.biases)):
        tensor = group.get(path)
        if tensor is None:
            continue
        if tensor.numel() != width or not tensor.is_floating_point():
            wrong.append(f"{path}.{name}: expected {width} numbers, got {list(tensor.shape)} ({tensor.dtype})")
        elif name == MAGNITUDE:
            pair.magnitude = tensor.flatten()
        else:
            pair.bias = tensor.flatten()
    return wrong


def _shape_fault(kind: LeafKind, module: nn.Module, a: Tensor, b: Tensor) -> str | None:
    d_in, d_out = kind.shape(module)
    if isinstance(kind, ConvKind):
        groups: int = module.groups  # type: ignore[assignment]
        sides = (d_in, *module.kernel_size)  # type: ignore[misc]
        if (
            a.dim() == kind.dimensions + 2
            and a.shape[1:] == sides
            and b.shape[0] == d_out
            and a.shape[0] == groups * b.shape[1]
        ):
            return None
        return (
            f"the model's convolution is {d_in} -> {d_out} wide with kernel {list(sides[1:])} and {groups} groups, but lora_A is "
            f"{list(a.shape)} and lora_B {list(b.shape)}"
        )
    if a.dim() == 2 and a.shape[1] == d_in and b.shape[0] == d_out:
        return None
    return f"the model's layer is {d_in} -> {d_out} wide, but lora_A is {list(a.shape)} and lora_B {list(b.shape)}"


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
        {path: _as_declared(draft.replaced[path], modules[path]) for path in modules if path in draft.replaced},
        draft.raw,
        draft.tokens,
        draft.tied,
    )


def _as_declared(group: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A module's replaced parameters in the module's own order, as a fresh adapter has them."""
    return {name: group[name] for name in module._parameters if name in group}
