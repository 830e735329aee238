"""How long the singular values of an adapter take: python bench/spectrum.py [--layers 32] [--rank 64] [--hidden 4096]

A PEFT folder of random bfloat16 values for all 7 matrices of each layer of a Llama of 7B's shape. Measured from the files on:
every singular value of every update, and the figures made of them. Beside it the way without the factors: torch's SVD of one
update formed whole in float32, times the number of updates.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import finish, table
from safetensors.torch import save_file

from lorakit.analyze.api import spectra
from lorakit.analyze.updates import Update, read_adapter


def matrices(hidden: int) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's matrices."""
    inner = hidden * 43 // 16  # 11,008 beside 4,096
    attention = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (hidden, hidden))
    return attention | {
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def write(folder: Path, ask: argparse.Namespace) -> int:
    """An adapter in `folder`; its bytes."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(ask.layers):
        for name, (inputs, outputs) in matrices(ask.hidden).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(ask.rank, inputs, generator=draw).to(torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, ask.rank, generator=draw).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": ask.rank,
        "lora_alpha": ask.rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in matrices(ask.hidden)),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def seconds(run: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def formed(update: Update) -> float:
    """The largest singular value of an update formed whole."""
    return float(torch.linalg.svdvals((update.b.float() @ update.a.float()) * update.scale)[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    ask = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        size = write(Path(place), ask)
        read = seconds(lambda: read_adapter(place), ask.rounds)
        adapter = read_adapter(place)
        ours = seconds(lambda: spectra(adapter.updates), ask.rounds)
        found = spectra(adapter.updates[:1])[0].values[0]
        whole = seconds(lambda: formed(adapter.updates[0]), 1) * len(adapter.updates)
        error = abs(formed(adapter.updates[0]) - found) / found
    rows = [
        ["updates", len(adapter.updates)],
        ["bytes of the file's tensors", f"{size:,}"],
        ["read and checked, s", read],
        ["all singular values and their figures, s", ours],
        ["the same by forming each update, s (one measured)", whole],
        ["relative difference of the largest singular value", error],
    ]
    result = {
        "settings": vars(ask),
        "bytes": size,
        "read_seconds": read,
        "spectrum_seconds": ours,
        "formed_seconds": whole,
        "relative_error": error,
    }
    finish("spectrum", result, table(["", ""], rows))


if __name__ == "__main__":
    main()
