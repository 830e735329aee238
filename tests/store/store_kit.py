"""What the store's tests share: a good folder, ways to damage it, and the one way in which a bad one must be refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.errors import FileError

TENSORS, CONFIG, EXTRA = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"
PREFIX = "base_model.model."
PAIR = PREFIX + "transformer.h.0.attn.c_attn"


def attached(model: nn.Module | None = None, **fields: Any) -> nn.Module:
    """A tiny GPT-2 (or `model`) with an adapter of random values."""
    model = tiny.gpt2() if model is None else model
    lk.attach(model, lk.LoRA(**({"r": 4, "alpha": 8, "target_modules": ["c_attn"]} | fields)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def good(folder: Path, **fields: Any) -> Path:
    """A sound adapter folder for tiny.gpt2()."""
    return lk.save(attached(**fields), folder)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The folder's tensors; with add={...} or drop=[...] written back so, and lorakit.json, whose hash they break, removed."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / TENSORS).items()}
    tensors |= options.get("add", {})
    for key in options.get("drop", ()):
        del tensors[key]
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / TENSORS, metadata={"format": "pt"}
    )
    (folder / EXTRA).unlink(missing_ok=True)
    return tensors


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of the tensors file, read by hand."""
    raw = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(folder: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def snapshot(model: nn.Module) -> Any:
    """All that a failed load must leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()},
        dict(lk.adapters(model)),
        id(model.__dict__.get("_lorakit")),
    )


def same(before: Any, after: Any) -> bool:
    return before[1:] == after[1:] and all(
        torch.equal(raw(before[0][name]), raw(after[0][name])) for name in before[0] | after[0]
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().flatten().view(torch.uint8)


def refused(source: Path | str, *wanted: str, model: nn.Module | None = None, **options: Any) -> list[str]:
    """`lk.load` refuses `source` with one FileError whose faults are just those wanted (a part of each is given), leaves
    the model as it was, and `lk.verify` tells the same."""
    model = tiny.gpt2() if model is None else model
    before = snapshot(model)
    with pytest.raises(FileError) as caught:
        lk.load(model, source, name="new", **options)
    faults = caught.value.faults
    assert same(before, snapshot(model))
    for part in wanted:
        assert any(part in fault for fault in faults), f"{part!r} is not among {faults}"
        assert part in str(caught.value)
    unexpected = [fault for fault in faults if not any(part in fault for part in wanted)]
    assert not unexpected
    assert len(set(faults)) == len(faults)
    assert list(lk.verify(source, model, **options).faults) == faults
    return faults
