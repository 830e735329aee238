"""`inspect`: what an adapter folder holds, told without a model."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit.methods.lora import LoRA
from lorakit.store.peft_folder import Parsed
from lorakit.store.read import TENSORS, locate, read_folder


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
