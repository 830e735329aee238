"""What the base's own dropout costs a training step on a CPU: lorakit's masks, torch's, and none at all, in turns in one process.

    python bench/base_dropout.py --model gpt2-small [--rounds 8]

A shape with random weights, adapted everywhere, 8 x 128; its nn.Dropout modules at 0.1, as GPT-2 and BERT have them. PEFT,
on the same batches, has torch's.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

from common import finish, table
from torch import nn

from lorakit.bench.config import LORAKIT, PEFT, ROWS, BenchConfig
from lorakit.bench.material import read, work_of
from lorakit.bench.sides import side_of

SHARE = 0.1


def set_dropout(model: nn.Module, share: float) -> int:
    """Have the model's dropout modules drop so many; how many there are."""
    found = [one for one in model.modules() if type(one) is nn.Dropout]
    for one in found:
        one.p = share
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-small")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    work = work_of(ROWS["equal"], read(BenchConfig(model=arguments.model, rows=["equal"], rounds=arguments.rounds)))
    ours: Any = side_of(LORAKIT, work)
    theirs: Any = side_of(PEFT, work)
    own = ours.trainer.base_dropout.drawing
    assert set_dropout(ours.run.model, SHARE), f"{arguments.model} has no dropout of its own"
    sides = {
        "lorakit, its masks": (ours, SHARE, own),
        "lorakit, torch's dropout": (ours, SHARE, nullcontext),
        "lorakit, no dropout": (ours, 0.0, own),
        "PEFT": (theirs, SHARE, None),
        "PEFT, no dropout": (theirs, 0.0, None),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn, numbers in enumerate(work.rounds):
        for name, (side, share, drawing) in sides.items():
            set_dropout(ours.run.model if side is ours else theirs.model, share)
            if drawing is not None:
                ours.trainer.base_dropout.drawing = drawing
            begin = time.perf_counter()
            side.round(numbers)
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    first = times["lorakit, its masks"]
    rows = []
    for name, one in times.items():
        over = [a / b for a, b in zip(one, first, strict=True)]
        middle = f"{statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})"
        rows.append([name, 1e3 * statistics.median(one), middle])
    text = table([f"{arguments.model}, {len(first)} rounds", "ms a step", "over lorakit"], rows)
    finish(f"base-dropout-{arguments.model}", {"seconds": times}, text)


if __name__ == "__main__":
    main()
