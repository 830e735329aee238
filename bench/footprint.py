"""What a LoRA layer's forward allocates in bfloat16, in sizes of its output, and what `import lorakit` costs over torch.

python bench/footprint.py [--rounds 9]: figures go to runs/bench/footprint.json.
"""

import argparse
import subprocess
import sys
from typing import Any

import torch
from attach import with_peft
from common import finish, interleaved, table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorakit as lk

TOKENS, WIDTH = 2048, 1024


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes anew, whether it is freed again at once or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.bytes += leaf.untyped_storage().nbytes()
        return out


def allocated(layer: nn.Module, x: torch.Tensor, *, grad: bool) -> float:
    """Bytes that one forward allocates, over the bytes of its output. grad: with what it saves for backward."""
    with torch.set_grad_enabled(grad), Allocations() as seen:
        y = layer(x)
    return seen.bytes / (y.numel() * y.element_size())


def layers() -> dict[str, nn.Module]:
    def plain() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(torch.bfloat16)

    ours = plain()
    lk.attach(ours, lk.LoRA(r=8, alpha=16), name="a")
    return {"plain": plain(), "lorakit": ours, "peft": with_peft(plain(), ["0"], ("a",))}


def imports(rounds: int) -> dict[str, float]:
    """Median seconds of a fresh interpreter that imports each."""

    def fresh(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    used = "lorakit.LoRA, lorakit.attach, lorakit.use, lorakit.merge"
    sides = {
        "torch": "import torch",
        "lorakit": "import torch, lorakit",
        "lorakit, and what attaches": f"import torch, lorakit; {used}",
        "peft": "import torch, peft",
    }
    return interleaved({name: lambda code=code: fresh(code) for name, code in sides.items()}, rounds, warmup=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    made = layers()
    sizes = {
        row: {name: allocated(layer, x, grad=grad) for name, layer in made.items()}
        for row, grad in (("no_grad", False), ("with gradients", True))
    }
    seconds = imports(options.rounds)
    heads = [f"allocated in one forward, bfloat16, {TOKENS} x {WIDTH}", *(f"{name}, outputs" for name in made)]
    text = table(heads, [[row, *values.values()] for row, values in sizes.items()])
    over = {name: value - seconds["torch"] for name, value in seconds.items()}
    text += "\n\n" + table(
        ["import", "seconds", "over torch"], [[name, value, over[name]] for name, value in seconds.items()]
    )
    finish("footprint", {"outputs": sizes, "import_seconds": seconds, "rounds": options.rounds}, text)


if __name__ == "__main__":
    main()
