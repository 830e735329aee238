"""What loading an adapter costs: GPT-2 small's shape, r = 8 on 48 layers (4.7 MB), with 0, 32 and 200 adapters resident.

    python bench/store.py [--rounds 15]

lorakit.load checks every file, hash, value and the base, and switches the adapter on; PEFT's load_adapter does neither.
PEFT is left out at 200: its cost grows with every resident, and loading 200 would take it minutes.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import finish, table

import lorakit as lk

RESIDENT = (0, 32, 200)
RESIDENT_PEFT = (0, 32)


def base() -> torch.nn.Module:
    """GPT-2 small from its configuration, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def adapter(folder: Path) -> Path:
    """A 4.7 MB adapter on the four projections of each block."""
    model = base()
    lk.attach(model, lk.LoRA(r=8, target_modules=["c_attn", "c_proj", "c_fc"]))
    return lk.save(model, folder)


Side = tuple[Callable[[str], Any], Callable[[str], Any]]  # load an adapter by a name; take it off again


def lorakit_side(folder: Path, resident: int) -> Side:
    model = base()
    for number in range(resident):
        lk.load(model, folder, name=f"resident{number}")
    return (lambda name: lk.load(model, folder, name=name)), (lambda name: lk.detach(model, name))


def peft_side(folder: Path, resident: int) -> Side:
    from peft import PeftModel

    if not resident:  # the first: the wrapping is part of its cost, as the first attach is of lorakit's
        return _first_in_peft(folder)
    model = PeftModel.from_pretrained(base(), str(folder), "resident0")
    for number in range(1, resident):
        model.load_adapter(str(folder), f"resident{number}")
    return (lambda name: model.load_adapter(str(folder), name)), model.delete_adapter


def _first_in_peft(folder: Path) -> Side:
    from peft import PeftModel

    plain, wrapped = base(), []

    def load(name: str) -> None:
        wrapped.append(PeftModel.from_pretrained(plain, str(folder), name))

    return load, lambda name: wrapped.pop().unload()


def measured(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """Median seconds of a load on each side, in turns; taking the adapter off again is not timed."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, (load, unload) in sides.items():
            begin = time.perf_counter()
            load(f"new{turn}")
            if turn > 1:
                times[name].append(time.perf_counter() - begin)
            unload(f"new{turn}")
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed loads a side; medians are taken")
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore", module="peft")
    result: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = adapter(Path(place))
        megabytes = (folder / "adapter_model.safetensors").stat().st_size / 1e6
        for resident in RESIDENT:
            sides = {"lorakit": lorakit_side(folder, resident)}
            if resident in RESIDENT_PEFT:
                sides["peft"] = peft_side(folder, resident)
            seconds = measured(sides, rounds)
            result[str(resident)] = {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
            ours, theirs = seconds["lorakit"], seconds.get("peft")
            rows.append(
                [
                    resident,
                    1e3 * ours,
                    "-" if theirs is None else 1e3 * theirs,
                    "-" if theirs is None else ours / theirs,
                ]
            )
    text = table(["resident", "lorakit ms", "PEFT ms", "lorakit / PEFT"], rows)
    finish("store", {"megabytes": megabytes, "rounds": rounds, "load": result}, text)


if __name__ == "__main__":
    main()
