"""The matrix products of a training step by torch's own library and by oneDNN, in turns: SmolLM2-135M's and GPT-2 small's.

python bench/gemm.py [--rounds 31] [--tokens 1024]: figures go to runs/bench/gemm.json. `x W^T` of one layer, its weight
stored (out, in) or, as Conv1D's, (in, out); the low-rank products at r=8; a head's logits in chunks of 256.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import finish, interleaved, table
from torch import Tensor

from lorakit.core.cross_entropy import CHUNK, PIECE
from lorakit.core.gemm import backend

R, TURNS = 8, 12  # matrices that take turns, so that none is in a cache because it was used just before


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def shapes(tokens: int) -> dict[str, tuple[int, int, int, bool]]:
    """What -> (rows, in, out, whether the weight is stored (in, out))."""
    return {
        "576 -> 1536": (tokens, 576, 1536, False),
        "576 -> 1536, its input's gradient": (tokens, 1536, 576, True),
        "1536 -> 576": (tokens, 1536, 576, False),
        "576 -> 576": (tokens, 576, 576, False),
        "768 -> 3072, Conv1D": (tokens, 768, 3072, True),
        "3072 -> 768, Conv1D": (tokens, 3072, 768, True),
        "384 -> 1536": (tokens, 384, 1536, False),
        "A x^T, 1536 wide": (R, 1536, tokens, False),
        "gradient of A, 1536 wide": (R, tokens, 1536, True),
        f"logits of a piece, 576 -> {PIECE} ({CHUNK} rows)": (CHUNK, 576, PIECE, False),
        "their gradient": (CHUNK, PIECE, 576, True),
    }


def measured(rows: int, d_in: int, d_out: int, stored_by_input: bool, rounds: int) -> dict[str, float]:
    """Median seconds of each library, and how far each is from float64 (norm of the difference over the norm)."""
    count = 1 if d_in * d_out > 2**24 else TURNS
    xs = [torch.randn(rows, d_in) for _ in range(count)]
    weights = [torch.randn(d_in, d_out).t() if stored_by_input else torch.randn(d_out, d_in) for _ in range(count)]

    def turn(product: Callable[[Tensor, Tensor], Tensor]) -> None:
        for x, weight in zip(xs, weights, strict=True):
            product(x, weight)

    sides = {"torch": by_torch, "onednn": by_onednn}
    times = interleaved({name: partial(turn, product) for name, product in sides.items()}, rounds)
    exact = xs[0].double() @ weights[0].double().t()
    errors = {
        f"{name} error": float((product(xs[0], weights[0]).double() - exact).norm() / exact.norm())
        for name, product in sides.items()
    }
    return {name: seconds / count for name, seconds in times.items()} | errors


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    found = {name: measured(*shape, given.rounds) for name, shape in shapes(given.tokens).items()}
    rows = [
        [
            name,
            1e3 * one["torch"],
            1e3 * one["onednn"],
            one["torch"] / one["onednn"],
            f"{one['torch error']:.1e} / {one['onednn error']:.1e}",
        ]
        for name, one in found.items()
    ]
    columns = ["product", "torch's, ms", "oneDNN, ms", "torch's / oneDNN", "from float64, torch / oneDNN"]
    text = table(columns, rows) + f"\n\nLORAKIT_GEMM=auto takes: {backend()}; {torch.backends.cpu.get_cpu_capability()}"
    finish("gemm", {"tokens": given.tokens, "chosen": backend(), "products": found}, text)


if __name__ == "__main__":
    main()
