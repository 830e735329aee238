"""What the tests of methods other than LoRA share: the methods, the families that take them, an adapter with random values."""

from typing import Any

import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.adapter_drop import AdapterDrop
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lin import LinAdapter
from lorakit.methods.pfeiffer import PfeifferAdapter
from lorakit.methods.residual_adapter import ResidualAdapter

FAMILIES = {name: make for name, make in tiny.MODELS.items() if name != "t5"}
ADAPTERS: dict[str, Any] = {
    "houlsby": HoulsbyAdapter(r=4),
    "lin": LinAdapter(r=4, activation="gelu"),
    "pfeiffer": PfeifferAdapter(r=4, activation="tanh"),
    "adapter-drop": AdapterDrop(r=4, drop=1),
    "parallel": ResidualAdapter(),
    "series": ResidualAdapter(kind="series", r=3),
}
COPIES: dict[str, Any] = {"full": FullFineTuning(), "top": FullFineTuning(top_layers=1), "bitfit": BitFit()}
METHODS = ADAPTERS | COPIES
CASES = [
    (family, name) for family in FAMILIES for name in METHODS if (family, name) != ("llama", "bitfit")
]  # Llama has no biases


def shaken(model: nn.Module, name: str = "a", seed: int = 3) -> nn.Module:
    """The model with random numbers added to every tensor of adapter `name`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]
