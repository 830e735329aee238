"""The layout of prompt tuning, P-tuning and prefix tuning: PEFT's own folders, with lorakit.json beside them.

`prompt_embeddings` is a prompt, (tokens, dim), or a prefix, (tokens, layers * 2 * heads * width): for each layer its keys, then
its values. Heads that are trained in full stand beside it as `base_model.<module>.<parameter>`. What made a prompt while it
was trained (P-tuning's encoder, the reparametrising MLP) is in no folder: its result is.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.host import Record
from lorakit.attach.method import Draft, Insert, Method
from lorakit.attach.targets import matches
from lorakit.errors import LorakitError, UsageError
from lorakit.methods.body import backbone, check_room, embedding_of
from lorakit.methods.kept import kept_places
from lorakit.methods.prefix import Prefix, attentions, heads_of, prefix_draft
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt import Prompt
from lorakit.store.card import method_card
from lorakit.store.files import json_bytes
from lorakit.store.identity import content_hash, fingerprint
from lorakit.store.layout import (
    EXTRA,
    FORMAT,
    TENSORS,
    Layout,
    Stored,
    hash_faults,
    read_extra,
    read_tensors_of,
    value_faults,
)
from lorakit.store.peft_config import CONFIG
from lorakit.store.peft_folder import WRAPPED
from lorakit.store.peft_prompt_config import TYPES, defaults, prompt_config, prompt_method, read_prompt_config

KEY, PREFIX = "prompt_embeddings", "base_model."


@dataclass
class PromptFile(Stored):
    """A folder of this layout as read."""

    @property
    def kind(self) -> str:
        return f"peft ({self.config.get('peft_type', 'unknown')})"

    def replaced(self) -> Collection[str]:
        return [_name(key) for key in self.tensors if key != KEY]

    def identity(self) -> str:
        return _hash(self.config, self.tensors)


class PeftPrompt(Layout):
    """See the module."""

    def takes(self, method: Method) -> bool:
        return type(method) in TYPES.values() and not (isinstance(method, PrefixTuning) and method.infix_length)

    def recognises(self, folder: Path) -> bool:
        return read_prompt_config(folder)[0].get("peft_type") in tuple(TYPES)

    def files(self, model: nn.Module, record: Record, notes: Mapping[str, Any]) -> dict[str, bytes]:
        from safetensors.torch import save as serialise

        tensors = to_tensors(record.draft, model)
        config = prompt_config(model, record, tensors[KEY])
        replaced = [_name(key) for key in tensors if key != KEY]
        extra = {
            "base_model": config["base_model_name_or_path"],
            **record.meta.get("extra", {}),
            **notes,
            "format": FORMAT,
            "method": record.method.name,
            "adapter": _hash(config, tensors),
            "base": fingerprint(model, replaced),
        }
        return {
            EXTRA: json_bytes(extra, "notes"),
            TENSORS: serialise(tensors, metadata={"format": "pt"}),
            CONFIG: json_bytes(config, CONFIG),
            "README.md": method_card(type(record.method).__name__, tensors, extra).encode(errors="replace"),
        }

    def read(self, folder: Path) -> PromptFile:
        found = PromptFile(folder)
        found.config, faults = read_prompt_config(folder)
        found.method, more = (None, []) if faults else prompt_method(found.config)
        found.faults += [type(fault)(f"{CONFIG}: {fault}") for fault in faults + more]
        found.extra, faults = read_extra(folder)
        found.faults += faults
        found.tensors, faults = read_tensors_of(folder)
        found.faults += faults + value_faults(found.tensors)
        if found.tensors:
            found.faults += _shape_faults(found) + hash_faults(found)
        return found

    def draft(self, found: Stored, method: Method, model: nn.Module) -> tuple[Method, Draft, list[str]]:
        if KEY not in found.tensors or found.tensors[KEY].dim() != 2:
            return method, Draft(), []  # told already
        try:
            draft = _prefix(found, model) if isinstance(method, PrefixTuning) else _prompt(found, model, method)
        except LorakitError as error:
            return method, Draft(), [str(error)]
        return method, draft, _add_replaced(draft, found, model)


def to_tensors(draft: Draft, model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors of a draft, on the CPU."""
    tensors = {KEY: result(draft, model)}
    for path, group in draft.replaced.items():
        tensors |= {f"{PREFIX}{path}{'.' if path else ''}{name}": tensor for name, tensor in group.items()}
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


@torch.no_grad()
def result(draft: Draft, model: nn.Module) -> Tensor:
    """What a prompt or prefix comes to: (tokens, dim) or (tokens, layers * 2 * heads * width)."""
    layers: list[Tensor] = []
    for path, group in draft.inserts.items():
        for insert in group.values():
            if isinstance(insert.operation, Prompt):
                return insert.operation.vectors(model.get_submodule(path), insert.tensors)[0]
            if isinstance(insert.operation, Prefix):
                layers += insert.operation.pair(insert.tensors)
    return torch.cat(layers, 1)


def _hash(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return content_hash(config, tensors, defaults(config))


def _name(key: str) -> str:
    """A key of the file as the model calls the parameter."""
    return WRAPPED.sub(".", key.removeprefix(PREFIX))


def _shape_faults(found: PromptFile) -> list[str]:
    """What a file's tensors are known to be wrong in without a model."""
    faults = [
        f"{key}: expected {KEY!r}, or a key that begins with {PREFIX!r}"
        for key in found.tensors
        if key != KEY and not key.startswith(PREFIX)
    ]
    tensor = found.tensors.get(KEY)
    if tensor is None:
        return [*faults, f"{KEY}: missing"]
    if tensor.dim() != 2 or not tensor.is_floating_point():
        return [
            *faults,
            f"{KEY}: expected a matrix of floating-point numbers, got {list(tensor.shape)} of {tensor.dtype}",
        ]
    rows, width = (found.config.get(key) for key in ("num_virtual_tokens", "token_dim"))
    if found.method is not None and tensor.shape[0] != rows:
        faults.append(f"{KEY}: {tensor.shape[0]} virtual tokens in the file, {rows} by {CONFIG}")
    if isinstance(found.method, PrefixTuning) and isinstance(width, int):
        layers = found.config.get("num_layers")
        width = width * 2 * layers if isinstance(layers, int) else None
    if found.method is not None and isinstance(width, int) and tensor.shape[1] != width:
        faults.append(f"{KEY}: {tensor.shape[1]} wide in the file, {width} by {CONFIG}")
    return faults


def _prompt(found: Stored, model: nn.Module, method: Method) -> Draft:
    """A stored prompt on a model. Raises LorakitError where it does not fit."""
    path, body = backbone(model, type(method).__name__)
    tensor, table = found.tensors[KEY], embedding_of(body)
    if tensor.shape[1] != table.embedding_dim:
        raise UsageError(f"{KEY}: {tensor.shape[1]} wide, and the model's embeddings {table.embedding_dim}")
    check_room(model, tensor.shape[0], "a prompt")
    prefix = tensor.to(table.weight.device)
    return Draft(inserts={path: {"prompt": Insert(Prompt.on(body, len(prefix), 0), {"prefix": prefix})}})


def _prefix(found: Stored, model: nn.Module) -> Draft:
    """A stored prefix on a model. Raises LorakitError where it does not fit."""
    path, body = backbone(model, "PrefixTuning")
    tensor, device = found.tensors[KEY], embedding_of(body).weight.device
    shapes = {below: heads_of(body, below, one) for below, one in attentions(body).items()}
    widths = [heads * width for heads, width in shapes.values() for _ in ("keys", "values")]
    if tensor.shape[1] != sum(widths):
        raise UsageError(
            f"{KEY}: {tensor.shape[1]} wide, and the model's {len(shapes)} layers have keys and values of {sum(widths)}"
        )
    check_room(model, tensor.shape[0], "a prefix")
    parts = iter(torch.split(tensor.to(device), widths, 1))
    made = {below: {"keys": next(parts).clone(), "values": next(parts).clone()} for below in shapes}
    return prefix_draft(path, body, tensor.shape[0], 0, shapes, made)


def _add_replaced(draft: Draft, found: Stored, model: nn.Module) -> list[str]:
    """Put the file's heads into the draft; returns what does not fit."""
    faults, given = [], {_name(key): tensor for key, tensor in found.tensors.items() if key != KEY}
    modules = dict(model.named_modules())
    for full, tensor in given.items():
        path, _, name = full.rpartition(".")
        own = modules[path]._parameters.get(name) if path in modules else None
        if own is None:
            faults.append(f"{full}: in the file, but the model has no such parameter")
        elif own.shape != tensor.shape:
            faults.append(f"{full}: expected {list(own.shape)}, got {list(tensor.shape)}")
        else:
            draft.replaced.setdefault(path, {})[name] = tensor.to(own.device)
    named = dict.fromkeys(found.config.get("modules_to_save") or ())  # PEFT notes heads by every name that it knows
    listed = [name for name in named if any(matches([name], path) for path in modules)]
    for path, name in kept_places(model, listed):
        full = f"{path}.{name}" if path else name
        if full not in given:
            faults.append(
                f"{full}: trained in full according to {CONFIG} (modules_to_save), but the file has no tensor for it"
            )
    return faults
