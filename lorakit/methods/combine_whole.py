"""What adapters train in full (heads, biases, token rows, ties) combined as lorakit.use weighs it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.attach.host import Record
from lorakit.attach.method import Draft, TokenRows
from lorakit.core.delta import is_dense
from lorakit.errors import AdapterError
from lorakit.methods.combine_maths import widest
from lorakit.methods.lora import LoRA


@dataclass(frozen=True)
class Part:
    """One adapter of a combination and its weight."""

    record: Record
    method: LoRA
    weight: float

    def ties(self) -> bool:
        """Whether ensure_weight_tying had anything to tie."""
        return self.method.ensure_weight_tying and bool(self.tied_paths())

    def tied_paths(self) -> set[str]:
        """The modules that share what the adapter has for one of them."""
        draft = self.record.draft
        owners: dict[int, set[str]] = {}
        for path, group in draft.replaced.items():
            for tensor in group.values():
                owners.setdefault(tensor.data_ptr(), set()).add(path)
        shared = {path for paths in owners.values() if len(paths) > 1 for path in paths}
        return shared | set(draft.tied) | set(draft.tied.values())


def weigh_whole(model: nn.Module, parts: Sequence[Part], draft: Draft) -> None:
    """Put into `draft` what the parts train in full, weighed: `base + sum of weight * (own - base)`."""
    _check_ties(parts)
    _check_rows(parts)
    made: dict[tuple[object, ...], Tensor] = {}  # tensors that were one stay one
    for path, module in model.named_modules():
        groups = [(part.record.draft.replaced.get(path, {}), part.weight) for part in parts]
        for name in dict.fromkeys(name for group, _ in groups for name in group):
            own = [(group[name], weight) for group, weight in groups if name in group]
            key = (id(module._parameters[name]), *((tensor.data_ptr(), weight) for tensor, weight in own))
            if key not in made:
                made[key] = _weighed(f"{path}.{name}", module._parameters[name], own)
            draft.replaced.setdefault(path, {})[name] = made[key]
        rows = [(part.record.draft.tokens[path], part.weight) for part in parts if path in part.record.draft.tokens]
        if rows:
            draft.tokens[path] = _rows(path, module._parameters["weight"], rows)
    for part in parts:
        draft.tied |= part.record.draft.tied


def _weighed(path: str, base: Tensor | None, own: Sequence[tuple[Tensor, float]]) -> Tensor:
    if len(own) == 1 and own[0][1] == 1.0:
        return own[0][0].detach().clone()
    if base is None or not is_dense(base):
        raise AdapterError(f"{path}: the base has no dense values there to weigh an adapter's against.")
    dtype, computed = widest([base, *(tensor for tensor, _ in own)])
    start = base.detach().to(computed)
    total = start.clone()
    for tensor, weight in own:
        total += weight * (tensor.detach().to(start) - start)
    return _rounded(path, total, dtype)


def _rows(path: str, weight: Tensor | None, own: Sequence[tuple[TokenRows, float]]) -> TokenRows:
    """The rows of all, those that one of the parts leaves alone counting as the base's there."""
    if len(own) == 1 and own[0][1] == 1.0:
        return TokenRows(own[0][0].indices.clone(), own[0][0].rows.detach().clone())
    if weight is None or not is_dense(weight):
        raise AdapterError(f"{path}: the base has no dense rows there to weigh an adapter's against.")
    dtype, computed = widest([weight, *(rows.rows for rows, _ in own)])
    indices: Tensor = torch.unique(torch.cat([rows.indices.to(weight.device) for rows, _ in own]))
    start = weight.detach()[indices].to(computed)
    total = start.clone()
    for rows, strength in own:
        at = torch.searchsorted(indices, rows.indices.to(weight.device))
        total[at] += strength * (rows.rows.detach().to(start) - start[at])
    return TokenRows(indices, _rounded(path, total, dtype))


def _rounded(path: str, total: Tensor, dtype: torch.dtype) -> Tensor:
    value = total.to(dtype)
    if not bool(value.isfinite().all()):
        raise AdapterError(f"{path}: the combination has numbers that {dtype} cannot hold. Choose smaller weights.")
    return value


def _check_ties(parts: Sequence[Part]) -> None:
    for part in parts:
        for other in parts:
            here = part.tied_paths() & set(other.record.draft.paths()) if part.ties() else set()
            if here and not other.ties():
                raise AdapterError(
                    f"adapter {part.record.name!r} ties {sorted(here)[0]} to another module (ensure_weight_tying), and "
                    f"{other.record.name!r} updates it untied: no file holds both."
                )


def _check_rows(parts: Sequence[Part]) -> None:
    """Rows trained in full stand in place of the updated ones, so the two do not add up."""
    for path in {path for part in parts for path in part.record.draft.tokens}:
        own = [part for part in parts if path in part.record.draft.tokens or path in part.record.draft.pairs]
        whole = [part for part in parts if "weight" in part.record.draft.replaced.get(path, {})]
        updated = [part for part in own if path in part.record.draft.pairs]
        if whole or (updated and not (len(own) == 1 and own[0].weight == 1.0)):
            raise AdapterError(
                f"{path}: some of its rows are trained in full (trainable_token_indices) and others of these adapters update "
                "the whole of it: their weighted sum is no adapter."
            )
