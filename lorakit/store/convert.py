"""convert: adapter files of the whole ecosystem, through PEFT's form in memory. Exact, or refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.errors import FileError, OutputError, UsageError
from lorakit.store.files import write_together
from lorakit.store.foreign.base import open_base
from lorakit.store.foreign.diffusers import Diffusers
from lorakit.store.foreign.format import Format, Options
from lorakit.store.foreign.gguf import Gguf
from lorakit.store.foreign.hub import Bundle, faults_of, sort
from lorakit.store.foreign.kohya import Kohya
from lorakit.store.foreign.loralib import Loralib
from lorakit.store.foreign.peft import Peft
from lorakit.store.foreign.source import DIFFUSERS as DIFFUSERS_FILES
from lorakit.store.foreign.source import Source, open_sources
from lorakit.store.foreign.vllm import Vllm
from lorakit.store.layout import Stored
from lorakit.store.layouts import layout_of, read
from lorakit.store.peft_config import CONFIG, parse_config
from lorakit.store.peft_lora import PeftLora
from lorakit.store.read import AdapterFile, checked, locate

FORMATS: dict[str, Format] = {one.name: one for one in (Peft(), Gguf(), Kohya(), Loralib(), Diffusers(), Vllm())}
Model = str | Path | nn.Module | Mapping[str, nn.Module]


@dataclass(frozen=True)
class ConvertReport:
    """What was read, recognised as `kind`, and written as `to`. components: the parts of a pipeline, () for one model."""

    source: str
    target: str
    kind: str
    to: str
    components: tuple[str, ...]
    modules: int
    parameters: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "peft",
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    base: Model | None = None,
    component: str | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Rewrite an adapter's file or folder as another program's. The source's kind is recognised by its content.

    alpha: for files that hold none (loralib). enable_lora: the adapted parts of loralib's fused layers. base: a model, a
    pipeline's components by name or a folder, where names or heads must be known (kohya, gguf, loralib's convolutions).
    component: the part of a pipeline that is meant. Raises FileError with every fault of the source and with everything
    that the target's format cannot hold exactly; UsageError, ModelError and OutputError on wrong arguments.
    """
    if to not in FORMATS:
        raise UsageError(f"to={to!r}: expected one of {', '.join(FORMATS)}.")
    path = Path(target).expanduser()
    options = _options(alpha, enable_lora, base, component)
    sources, kind, bundle, notes = _read(locate(source), options)
    _check_free(path, [one.path for one in sources], overwrite)
    written = FORMATS[to].write(bundle, path, options)
    write_together(written.files)
    pairs = {name: sort(adapter.tensors).pairs for name, adapter in bundle.items()}
    return ConvertReport(
        source=str(source),
        target=str(target),
        kind=kind,
        to=to,
        components=tuple(name for name in bundle if name),
        modules=sum(len(found) for found in pairs.values()),
        parameters=sum(tensor.numel() for adapter in bundle.values() for tensor in adapter.tensors.values()),
        files=tuple(str(one) for one in written.files),
        notes=tuple(notes + written.notes),
    )


def read_any(
    path: str | Path,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    base: Model | None = None,
    component: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(PEFT's configuration, PEFT's tensors, notes) of one adapter in any format. Nothing is written.

    Raises FileError on a file with several components unless `component` names one, and on all that `convert` refuses.
    """
    _, _, bundle, _ = _read(Path(path).expanduser(), _options(alpha, enable_lora, base, component))
    if len(bundle) > 1:
        raise FileError(f"{path} holds adapters of {', '.join(bundle)}: choose one with component.")
    adapter = next(iter(bundle.values()))
    return adapter.config, adapter.tensors, adapter.notes


def read_parts(path: Path, **options: Any) -> tuple[str, dict[str, AdapterFile], list[str], int]:
    """(kind, adapters by component, faults, numbers in the file) of another program's file, for those who look for faults.

    options: alpha, enable_lora, base, as for `convert`. Raises FileError where no format knows the file.
    """
    chosen = _options(options.get("alpha"), options.get("enable_lora"), options.get("base"), None)
    sources = open_sources(path).values()
    kinds = ", ".join(dict.fromkeys(_recognise(one).name for one in sources))
    numbers = sum(tensor.numel() for one in sources for tensor in one.tensors.values())
    try:
        _, _, bundle, _ = _read(path, chosen)
    except FileError as error:
        return kinds, {}, error.faults or [str(error)], numbers
    parts = {}
    for name, one in bundle.items():
        config, method, faults = parse_config(json.dumps(one.config))
        parts[name] = checked(AdapterFile(path, config, method, one.tensors, faults=faults))
    return kinds, parts, [], numbers


def read_source(path: Path, model: nn.Module, component: str | None) -> Stored:
    """An adapter for `model` in any format that a load may open: an adapter's folder, or another program's safetensors file.
    The hash of its content may still be being worked out (Stored.settle).

    Faults of a folder are collected; a foreign file that cannot be read raises FileError.
    """
    foreign = path if path.suffix == ".safetensors" and path.is_file() else path / DIFFUSERS_FILES[0]
    if not foreign.is_file() or (path / CONFIG).is_file():
        return read(path, wait=False)
    config, tensors, _ = read_any(foreign, base={component: model} if component else model, component=component)
    config, method, faults = parse_config(json.dumps(config))
    return checked(AdapterFile(path, config, method, tensors, faults=faults))


def _options(
    alpha: float | None, enable_lora: Sequence[bool] | None, base: Model | None, component: str | None
) -> Options:
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UsageError(f"alpha={alpha!r}: expected a number over 0.")
    if enable_lora is not None and not any(enable_lora):
        raise UsageError("enable_lora: expected at least one part that is enabled, as in (True, False, True).")
    enabled = None if enable_lora is None else tuple(bool(one) for one in enable_lora)
    return Options(alpha, enabled, None if base is None else open_base(base), component)


def _read(path: Path, options: Options) -> tuple[list[Source], str, Bundle, list[str]]:
    """(sources, kind, adapters, notes), each adapter checked."""
    if not isinstance(layout_of(path), PeftLora):
        raise FileError(f"{path} is of {read(path).kind}: only LoRA has a place in other programs' files.")
    sources = open_sources(path)
    bundle: Bundle = {}
    notes: list[str] = []
    kinds = dict.fromkeys(_recognise(source).name for source in sources.values())
    for name, source in sources.items():
        found = _recognise(source).read(source, options)
        bundle |= {name: found[""]} if name else found
        notes += [f"left out of {source.path.name}: {', '.join(source.left_out)}"] if source.left_out else []
    if options.component in bundle and len(bundle) > 1:
        bundle = {str(options.component): bundle[str(options.component)]}
    faults = [f"{name}.{fault}" if name else fault for name, one in bundle.items() for fault in faults_of(one)]
    if faults:
        raise FileError(f"{path} is damaged, or no adapter's file:", faults)
    return list(sources.values()), ", ".join(kinds), bundle, notes


def _recognise(source: Source) -> Format:
    for found in FORMATS.values():
        if found.recognises(source):
            return found
    known = "\n".join(f"  {one.name}: {one.what}" for one in FORMATS.values())
    keys = ", ".join(list(source.tensors)[:3])
    raise FileError(
        f"{source.path}: its keys ({keys[:200]}, ...) are of no adapter that lorakit knows. It knows\n{known}"
    )


def _check_free(target: Path, sources: list[Path], overwrite: bool) -> None:
    """Nothing that stands there is replaced unasked, and never what is being read."""
    taken = [one for one in sources if one.resolve() == target.resolve() or target.resolve() == one.parent.resolve()]
    if taken:
        raise OutputError(f"{target} is where the source is. Choose another place.")
    there = target.exists() and (target.is_file() or any(target.iterdir()))
    if there and not overwrite:
        raise OutputError(f"{target} is there already. Choose another place, or say overwrite (--overwrite).")
