"""What the measurements share: interleaved timing, medians, a table and a JSON file."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # real data sets, beside the project


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {"cores": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__}


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each side, run in turns, so that a machine whose speed drifts drifts for all alike.

    A side that returns a float has measured itself: those are its seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            own = run()
            if turn >= warmup:
                times[name].append(own if isinstance(own, float) else time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finish(name: str, result: Mapping[str, Any], text: str) -> None:
    """Write runs/bench/NAME.json and print the table."""
    path = ROOT / "runs" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "on": machine()}, indent=2) + "\n")
    print(text)
    print(f"\n{path.relative_to(ROOT)}")
