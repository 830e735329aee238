"""`lorakit.compress`: an adapter of lower ranks, by the best approximation of each update, still a PEFT folder."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.analyze.ranks import by_bytes, by_energy, by_rank
from lorakit.analyze.spectrum import energy as energy_of
from lorakit.analyze.spectrum import singular_values
from lorakit.analyze.updates import Adapter, Update, read_adapter
from lorakit.errors import OutputError, UsageError
from lorakit.methods.lora import LoRA
from lorakit.store.card import model_card
from lorakit.store.files import json_bytes, write_together
from lorakit.store.identity import content_hash
from lorakit.store.peft_config import CONFIG
from lorakit.store.peft_folder import EMBEDDING, LINEAR, PREFIX
from lorakit.store.read import EXTRA, FORMAT, TENSORS

ROUNDING = 1e-6  # the relative error up to which two updates are called the same


@dataclass(frozen=True)
class LayerLoss:
    """One layer: its rank before and after, the share of its energy that was kept, and `||dW' - dW||_F / ||dW||_F`, measured on
    the tensors as written. changed: whether they are others than before."""

    path: str
    rank: int
    kept: int
    energy: float
    error: float
    changed: bool


@dataclass(frozen=True)
class CompressReport:
    """What compressing made of an adapter. bytes: of the tensors' file; error: over all layers, relative Frobenius.

    verdict: "unchanged" (every tensor is as it was), "exact to rounding" (every layer's update is the same to ROUNDING) or
    "lossy".
    """

    source: str
    target: str
    layers: tuple[LayerLoss, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    error: float
    verdict: str


def compress(
    source: str | Path,
    target: str | Path,
    *,
    energy: float | None = None,
    rank: int | None = None,
    bytes: int | None = None,
    overwrite: bool = False,
) -> CompressReport:
    """Write an adapter of lower ranks to the folder `target`: the best approximation of each update (Eckart, Young 1936).

    One of: energy, the share of each layer's `||dW||_F^2` to keep; rank, for every layer; bytes, the size of the tensors' file,
    shared out over the layers by what each direction is worth. Singular values are split evenly between the factors, the
    scaling stays, tensors keep their types, heads and biases stay as they are. A layer that loses no rank is not touched.
    Raises UsageError on other options, and by name on what cannot be compressed (DoRA, whose magnitudes belong to the old
    directions; stacks of experts, attention modules, grouped convolutions, tied pairs); FileError on a damaged source;
    OutputError where the target is taken, unless `overwrite`.
    """
    if sum(one is not None for one in (energy, rank, bytes)) != 1:
        raise UsageError("say one of energy, rank and bytes: how much of the adapter is to be kept.")
    adapter = read_adapter(source)
    path = Path(target).expanduser()
    _check_free(path, adapter.file.folder, overwrite)
    _check_kind(adapter)
    values = singular_values(adapter.updates)
    ranks = _ranks(adapter, values, energy, rank, bytes)
    tensors, layers, errors = dict(adapter.file.tensors), list[LayerLoss](), list[float]()
    for update, own, kept in zip(adapter.updates, values, ranks, strict=True):
        a, b = _truncated(update, kept)
        missing = _missing(update, a, b)
        _put(tensors, adapter, update, a, b)
        errors.append(missing)
        layers.append(_loss(update, own, kept, missing))
    config = _config(adapter, dict(zip((one.path for one in adapter.updates), ranks, strict=True)))
    whole = math.sqrt(sum(float(one.square().sum()) for one in values))
    report = CompressReport(
        source=str(source),
        target=str(target),
        layers=tuple(layers),
        parameters_before=_count(adapter.file.tensors),
        parameters_after=_count(tensors),
        bytes_before=len(_serialised(adapter.file.tensors)),
        bytes_after=len(_serialised(tensors)),
        error=math.hypot(*errors) / whole if whole else 0.0,
        verdict=_verdict(layers),
    )
    how = {"energy": energy, "rank": rank, "bytes": bytes}
    _write(path, adapter, config, tensors, report, {key: one for key, one in how.items() if one is not None})
    return report


def _check_free(target: Path, source: Path, overwrite: bool) -> None:
    if target.resolve() == source.resolve():
        raise OutputError(f"{target} is where the source is. Choose another place.")
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise OutputError(f"{target} is there already. Choose another place, or say overwrite (--overwrite).")


def _check_kind(adapter: Adapter) -> None:
    """Refuse, by name, what a lower rank would break."""
    method, pairs = adapter.method, adapter.file.parsed.pairs
    reasons = []
    if method.use_dora:
        reasons.append("DoRA (use_dora): its magnitudes belong to the directions that W + dW has now")
    if method.target_parameters:
        reasons.append("target_parameters: the experts of a stack share one rank")
    if method.ensure_weight_tying:
        reasons.append("ensure_weight_tying: the head's pair must stay its embedding's, number for number")
    attention = [path for path in pairs if ".base_layer." in path]
    if attention:
        reasons.append(f"{attention[0]}: torch's attention layer has one rank for all its projections")
    grouped = sorted({one.path.rpartition("[")[0] for one in adapter.updates if one.is_part})
    if grouped and not method.target_parameters:
        reasons.append(f"{', '.join(grouped)}: a grouped convolution's rank is a multiple of its groups")
    if reasons:
        raise UsageError(f"{adapter.source} cannot be compressed: {'; '.join(reasons)}.")


def _ranks(
    adapter: Adapter, values: Sequence[Tensor], energy: float | None, rank: int | None, budget: int | None
) -> list[int]:
    stored = [update.rank for update in adapter.updates]
    if energy is not None:
        return [min(one, two) for one, two in zip(by_energy(values, energy), stored, strict=True)]
    if rank is not None:
        return by_rank(stored, rank)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError(f"bytes={budget!r}: expected a whole number of bytes of at least 1.")
    costs = [_direction_bytes(update) for update in adapter.updates]
    whole = len(_serialised(adapter.file.tensors))
    if budget >= whole:
        return stored
    least = whole - sum(cost * one for cost, one in zip(costs, stored, strict=True))  # heads, biases, the header
    return by_bytes(values, costs, budget - least, least)


def _direction_bytes(update: Update) -> int:
    """Bytes of one direction: a row of A and a column of B."""
    return update.a.shape[1] * update.a.element_size() + update.b.shape[0] * update.b.element_size()


def _truncated(update: Update, kept: int) -> tuple[Tensor, Tensor]:
    """(a, b) of rank `kept` in the file's types; the update's own where it loses none."""
    if kept == update.rank:
        return update.a, update.b
    qa, ra = torch.linalg.qr(update.a.t().double())
    qb, rb = torch.linalg.qr(update.b.double())
    u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    if not s[0] > 0:  # a zero update: A stays as it was drawn, or it could not be trained on
        return update.a[:kept].clone(), update.b[:, :kept].clone()
    root = s[:kept].sqrt()
    short = kept - root.numel()  # a rank above the layer's own widths: rows of zeros
    a = torch.nn.functional.pad(root[:, None] * (vh[:kept] @ qa.t()), (0, 0, 0, short))
    b = torch.nn.functional.pad(qb @ u[:, :kept] * root, (0, short))
    return a.to(update.a.dtype), b.to(update.b.dtype)


def _missing(update: Update, a: Tensor, b: Tensor) -> float:
    """`||dW' - dW||_F` of the factors as written: the difference is a product of factors side by side."""
    if a is update.a:
        return 0.0
    ra = torch.linalg.qr(torch.cat([update.a, a]).t().double(), mode="r").R
    rb = torch.linalg.qr(torch.cat([update.b, -b], dim=1).double(), mode="r").R
    return float((rb @ ra.t()).norm()) * abs(update.scale)


def _loss(update: Update, values: Tensor, kept: int, missing: float) -> LayerLoss:
    norm = float(values.norm())
    share = float(energy_of(values)[min(kept, values.numel()) - 1])
    error = missing / norm if norm else 0.0
    return LayerLoss(update.path, update.rank, kept, share, error, kept != update.rank)


def _verdict(layers: Sequence[LayerLoss]) -> str:
    if not any(layer.changed for layer in layers):
        return "unchanged"
    return "exact to rounding" if all(layer.error <= ROUNDING for layer in layers) else "lossy"


def _put(tensors: dict[str, Tensor], adapter: Adapter, update: Update, a: Tensor, b: Tensor) -> None:
    names = EMBEDDING if update.path in adapter.file.parsed.embeddings else LINEAR
    old = adapter.file.parsed.pairs[update.path]
    tensors[f"{PREFIX}{update.path}.{names[0]}"] = a.reshape(-1, *old[0].shape[1:]).contiguous()
    tensors[f"{PREFIX}{update.path}.{names[1]}"] = b.reshape(b.shape[0], -1, *old[1].shape[2:]).contiguous()


def _config(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The source's configuration with the new ranks, and alphas that keep each layer's scaling."""
    method = adapter.method
    wanted = {path: (rank, _alpha(method, path, rank)) for path, rank in ranks.items()}
    (common, alpha), _ = Counter(wanted.values()).most_common(1)[0]
    others = {path: pair for path, pair in wanted.items() if pair != (common, alpha)}
    return {
        **adapter.file.config,
        "r": common,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": rank for path, (rank, _) in others.items()},
        "alpha_pattern": {f"^{re.escape(path)}": own for path, (_, own) in others.items()},
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(method: LoRA, path: str, rank: int) -> float:
    """The alpha with which `rank` has the scaling that the method gives `path`; a whole number where it is one."""
    alpha = method.scaling(path) * (math.sqrt(rank) if method.use_rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def _write(
    target: Path,
    adapter: Adapter,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    report: CompressReport,
    how: Mapping[str, float],
) -> None:
    said = adapter.file.extra
    old = {"adapter": content_hash(adapter.file.config, adapter.file.tensors), "metrics": said.get("metrics")}
    extra = {
        **{key: value for key, value in said.items() if key != "metrics"},  # measured on another adapter
        "format": FORMAT,
        "method": adapter.method.name,
        "adapter": content_hash(config, tensors),
        "compressed": {"from": old, **how, "error": report.error, "verdict": report.verdict},
    }
    content = {
        EXTRA: json_bytes(extra, EXTRA),
        TENSORS: _serialised(tensors),
        CONFIG: json_bytes(config, CONFIG),
        "README.md": model_card(config, tensors, extra).encode(errors="replace"),
    }
    write_together({target / name: partial(_fill, data=data) for name, data in content.items()})


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, metadata={"format": "pt"})


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
