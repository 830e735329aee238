"""What the tests of the analysis share: adapters on tiny models with updates of a known make."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.store.read import read_folder

PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]


def adapter(folder: Path, model: nn.Module | None = None, *, seed: int = 0, decay: float = 1.0, **fields: Any) -> Path:
    """A folder for tiny.llama() with random factors; decay: of each next direction against the one before."""
    model = tiny.llama() if model is None else model
    lk.attach(model, lk.LoRA(**({"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]} | fields)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * decay ** torch.arange(len(drawn)).view(-1, *[1] * (drawn.dim() - 1)))
    return lk.save(model, folder)


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """path -> the update, multiplied out in float64."""
    found = read_folder(folder)
    assert not found.faults
    return {
        path: found.method.scaling(path) * pair[1].double().flatten(1) @ pair[0].double().flatten(1)
        for path, pair in found.parsed.pairs.items()
    }


def digest(folder: Path) -> str:
    """The hash of every file of a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def orthonormal(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
