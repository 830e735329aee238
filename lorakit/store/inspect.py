"""`inspect`: what an adapter holds, whatever program wrote it, told without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.methods.lora import LoRA
from lorakit.store.convert import Model, read_parts
from lorakit.store.layout import TENSORS, Stored
from lorakit.store.layouts import layout_of, read
from lorakit.store.peft_config import CONFIG
from lorakit.store.peft_folder import Parsed
from lorakit.store.peft_lora import PeftLora
from lorakit.store.read import AdapterFile, locate
from lorakit.store.several import Combined


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted layer. shape: (in, out), a convolution's in with its kernel; norm: Frobenius norm of `scale * B A`, from the
    small factors (dW is never formed); dora: the file has the lengths of the weight's rows beside it."""

    path: str
    rank: int
    shape: tuple[int, int]
    scaling: float
    dtype: str
    norm: float
    dora: bool = False


@dataclass(frozen=True)
class Inspection:
    """An adapter in figures. bytes: of the tensors file; replaced: names of what is trained in full."""

    source: str
    kind: str
    base: str | None
    identity: str | None
    modules: tuple[ModuleInfo, ...]
    replaced: tuple[str, ...]
    parameters: int
    bytes: int
    config: dict[str, object]
    faults: tuple[str, ...]


def inspect(
    source: str | Path,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    base: Model | None = None,
) -> Inspection:
    """Read any adapter and tell its kind, base, modules, ranks, scaling, parameters, size, norms and faults.

    source: an adapter's folder, a hub id, or another program's file (see lorakit.convert, also for the options). What a file
    cannot tell without an option that is missing is a fault.
    """
    path = locate(source)
    if (path / CONFIG).is_file() or not path.exists() or not isinstance(layout_of(path), PeftLora):
        return _stored(str(source), read(path))
    return _foreign(str(source), path, {"alpha": alpha, "enable_lora": enable_lora, "base": base})


def _stored(source: str, found: Stored) -> Inspection:
    """A folder of any layout; of a combination the parts together."""
    if isinstance(found, Combined):
        return _combined(source, found)
    path = found.folder / TENSORS
    lora = found if isinstance(found, AdapterFile) else None
    return Inspection(
        source=source,
        kind=found.kind,
        base=found.base(),
        identity=_text(found.extra.get("adapter")),
        modules=() if lora is None or lora.method is None or found.faults else _modules(lora.method, lora.parsed),
        replaced=(*found.replaced(), *(() if lora is None else lora.parsed.tokens)),
        parameters=sum(tensor.numel() for tensor in found.tensors.values()),
        bytes=path.stat().st_size if path.is_file() else 0,
        config={key: value for key, value in found.config.items() if value not in (None, {}, [], False)},
        faults=tuple(found.faults),
    )


def _combined(source: str, found: Combined) -> Inspection:
    parts = [_stored(source, part) for part in found.parts.values()]
    return Inspection(
        source=source,
        kind=found.kind,
        base=found.base(),
        identity=_text(found.extra.get("adapter")),
        modules=tuple(module for part in parts for module in part.modules),
        replaced=tuple(dict.fromkeys(name for part in parts for name in part.replaced)),
        parameters=sum(part.parameters for part in parts),
        bytes=sum(part.bytes for part in parts),
        config={name: part.config for name, part in zip(found.parts, parts, strict=True)},
        faults=tuple(found.faults),
    )


def _foreign(source: str, path: Path, options: Mapping[str, Any]) -> Inspection:
    """An adapter of another program: what `convert` makes of it."""
    kind, parts, faults, numbers = read_parts(path, **options)
    found = [(name, _stored(source, one)) for name, one in parts.items()]
    names = [(f"{name}." if name else "", one) for name, one in found]
    return Inspection(
        source=source,
        kind=kind,
        base=None,
        identity=None,
        modules=tuple(replace(module, path=prefix + module.path) for prefix, one in names for module in one.modules),
        replaced=tuple(prefix + name for prefix, one in names for name in one.replaced),
        parameters=numbers,
        bytes=path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir()),
        config=found[0][1].config if len(found) == 1 else {},
        faults=(*faults, *(prefix + fault for prefix, one in names for fault in one.faults)),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _modules(method: LoRA, parsed: Parsed) -> tuple[ModuleInfo, ...]:
    rows = []
    for path, halves in parsed.pairs.items():
        a, b, scale = halves[0], halves[1], method.scaling(path)
        inner, outer = (a.shape[1:].numel(), b.shape[0])
        rows.append(
            ModuleInfo(
                path,
                a.shape[0],
                (inner, outer),
                scale,
                str(a.dtype).removeprefix("torch."),
                abs(scale) * _norm(a.double().flatten(1), b.double().flatten(1), method.rank(path)),
                path in parsed.magnitudes,
            )
        )
    return tuple(rows)


def _norm(a: Tensor, b: Tensor, r: int) -> float:
    """The Frobenius norm of B A. a: (rank, in * kernel); b: (out, rank / groups); or of a stack of experts, r each."""
    if a.shape[0] == b.shape[1] and a.shape[0] > r and a.shape[0] % r == 0:
        experts = a.shape[0] // r
        blocks = [(a[e * r : (e + 1) * r], b[:, e::experts]) for e in range(experts)]
    else:
        groups = a.shape[0] // b.shape[1]
        blocks = list(zip(a.chunk(groups), b.chunk(groups), strict=True))
    # ||B A||_F^2 = tr((A A^T)(B^T B)): two small Gram matrices
    squares = [((one @ one.t()) * (two.t() @ two)).sum().clamp(min=0) for one, two in blocks]
    return float(sum(squares, start=a.new_zeros(())).sqrt())
