"""`inspect`: what an adapter folder holds, told without a model."""

from dataclasses import dataclass
from pathlib import Path

from lorakit.methods.lora import LoRA
from lorakit.store.peft_folder import Parsed
from lorakit.store.read import TENSORS, locate, read_folder


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted layer. norm: Frobenius norm of `scale * B A`, from the small factors (dW is never formed)."""

    path: str
    rank: int
    shape: tuple[int, int]
    scaling: float
    dtype: str
    norm: float


@dataclass(frozen=True)
class Inspection:
    """An adapter folder in figures. bytes: of the tensors file; replaced: names of what is trained in full."""

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


def inspect(source: str | Path) -> Inspection:
    """Read an adapter folder or hub id and tell its kind, base, modules, ranks, scaling, parameters, size, norms and faults."""
    found = read_folder(locate(source))
    modules = () if found.faults or found.method is None else _modules(found.method, found.parsed)
    path = found.folder / TENSORS
    return Inspection(
        source=str(source),
        kind=str(found.config.get("peft_type", "unknown")),
        base=_text(found.config.get("base_model_name_or_path")),
        identity=_text(found.extra.get("adapter")),
        modules=modules,
        replaced=tuple(found.parsed.plain),
        parameters=sum(tensor.numel() for tensor in found.tensors.values()),
        bytes=path.stat().st_size if path.is_file() else 0,
        config={key: value for key, value in found.config.items() if value not in (None, {}, [], False)},
        faults=tuple(found.faults),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _modules(method: LoRA, parsed: Parsed) -> tuple[ModuleInfo, ...]:
    rows = []
    for path, halves in parsed.pairs.items():
        a, b, scale = halves[0].double(), halves[1].double(), method.scaling(path)
        # ||s B A||_F^2 = s^2 tr((A A^T)(B^T B)): two small Gram matrices
        norm = abs(scale) * float(((a @ a.t()) * (b.t() @ b)).sum().clamp(min=0).sqrt())
        rows.append(
            ModuleInfo(
                path, a.shape[0], (a.shape[1], b.shape[0]), scale, str(halves[0].dtype).removeprefix("torch."), norm
            )
        )
    return tuple(rows)
