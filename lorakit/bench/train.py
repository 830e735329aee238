"""`lorakit bench train`: lorakit's training against PEFT's, full fine-tuning and the frozen base's floor."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lorakit.bench.config import PEFT, ROWS, BenchConfig, RowKind
from lorakit.bench.material import TASKS, Material, read, work_of
from lorakit.bench.measure import RowResult, SideResult, measure
from lorakit.bench.memory import peak_above_model
from lorakit.core.gemm import backend
from lorakit.errors import UsageError
from lorakit.run.listen import Listener


@dataclass(frozen=True)
class BenchReport:
    """Everything that was measured, and on what."""

    config: BenchConfig
    task: str
    parameters: int
    machine: dict[str, Any]
    rows: Sequence[RowResult]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return asdict(self)


def bench_train(config: BenchConfig, listener: Listener | None = None) -> BenchReport:
    """Measure the rows of `config`. Raises UsageError, ModelError, DataError; TrainingError for a gradient that is missing."""
    listener = listener or Listener()
    if config.rows is not None:
        _check_peft([ROWS[name] for name in config.rows])
    listener.stage(f"loading {config.model}")
    material = read(config)
    kinds = rows_of(material)
    _check_peft(kinds)
    works = [work_of(kind, material) for kind in kinds]  # what does not fit is told before anything is measured
    listener.note(", ".join(f"{key} {value}" for key, value in machine().items()))
    found = []
    for work in works:
        listener.stage(f"{work.kind.name}: {work.kind.about}")
        result = measure(work, listener.progress)
        found.append(_with_memory(result, config, listener) if config.memory else result)
    total = sum(parameter.numel() for parameter in material.loaded.model.parameters())
    return BenchReport(config, material.task, total, machine(), found)


def rows_of(material: Material) -> list[RowKind]:
    """The rows that are asked for, or all that go with the model and the data."""
    config = material.config
    if config.rows is not None:
        return [ROWS[name] for name in dict.fromkeys(config.rows)]
    causal = material.task == TASKS[0]
    return [
        kind for kind in ROWS.values() if (causal or not kind.masked) and (not kind.real or config.data is not None)
    ]


def machine() -> dict[str, Any]:
    """What the figures are taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "products by": backend(),
        "peft": importlib.metadata.version("peft") if importlib.util.find_spec("peft") else None,
    }


def _check_peft(kinds: Sequence[RowKind]) -> None:
    needing = [kind.name for kind in kinds if PEFT in kind.sides]
    if needing and importlib.util.find_spec("peft") is None:
        others = [kind.name for kind in ROWS.values() if PEFT not in kind.sides]
        raise UsageError(
            f"the rows {', '.join(needing)} measure PEFT, which is not installed. Install it (pip install peft), or ask for "
            f"other rows: --rows {','.join(others)}."
        )


def _with_memory(row: RowResult, config: BenchConfig, listener: Listener) -> RowResult:
    sides: list[SideResult] = []
    for done, side in enumerate(row.sides):
        listener.stage(f"{row.name}: the memory of {side.name}")
        sides.append(replace(side, peak_memory=peak_above_model(config, row.name, side.name)))
        listener.progress(done + 1, len(row.sides))
    return replace(row, sides=sides)
