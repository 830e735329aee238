"""Small modules of every layer kind, and the configurations that PEFT's own tests put on such modules.

The table follows PEFT's tests/test_custom_models.py (the LoRA part); bias, patterns, rsLoRA and starts are crossed in.
Everything is float64, so that the two libraries may differ by rounding alone: a cast on the way shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk

TO_PEFT = {"alpha": "lora_alpha", "dropout": "lora_dropout", "init": "init_lora_weights"}
VOCAB, ROWS = 30, 4


class Mlp(nn.Module):
    """in 10 -> lin0 20 -> lin1 6 -> head 2."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 6, bias=bias)
        self.head = nn.Linear(6, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.lin0(x).relu()).tanh())

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(ROWS, 10)


class Deep(nn.Module):
    """Numbered layers, for layers_to_transform and patterns over whole paths."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(3))
        self.body = nn.ModuleDict({"layers": layers})  # PEFT finds no numbers that stand at the root

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body["layers"]:
            x = x + layer["down"](layer["up"](x).relu())
        return x

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(ROWS, 3, 6)


class EmbeddingConv1D(nn.Module):
    """An embedding, Hugging Face's Conv1D (weight stored (in, out)), a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 5)
        self.conv1d = Conv1D(7, 5)
        self.lin0 = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1d(self.emb(x)).relu())

    @staticmethod
    def inputs() -> Tensor:
        return torch.randint(0, VOCAB, (ROWS, 6))


class Convolution(nn.Module):
    """One convolution of `dimensions` dimensions over inputs 6 wide, then a linear layer over all that it gives."""

    def __init__(self, dimensions: int, **options: Any) -> None:
        super().__init__()
        self.dimensions, self.channels = dimensions, options.pop("channels", 3)
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.conv = kind(self.channels, options.pop("out", 6), options.pop("kernel", 3), **options)
        with torch.no_grad():
            width = self.conv(self.inputs()).flatten(1).shape[1]
        self.lin0 = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv(x).relu().flatten(1))

    def inputs(self) -> Tensor:
        return torch.randn(ROWS, self.channels, *[6] * self.dimensions)


class Attention(nn.Module):
    """PyTorch's attention layer, which reads its projections' weights itself."""

    def __init__(self, batch_first: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.lin0 = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(ROWS, 5, 8)


class OwnParameter(nn.Module):
    """A matrix that its module reads itself."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class OwnParameters(nn.Module):
    """Two layers whose weights are raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = OwnParameter(10, 12), OwnParameter(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(ROWS, 10)


class Experts(nn.Module):
    """Stacks of experts' weights: (E, out, in), or (E, in, out) where is_transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 6, 10), (3, 10, 6)
        self.up = nn.Parameter(torch.randn(down if transposed else up) * 0.3)
        self.down = nn.Parameter(torch.randn(up if transposed else down) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, 10) -> (tokens, 10)."""
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        return torch.bmm(torch.bmm(x.expand(3, *x.shape), up).relu(), down).mean(0)


class Mixture(nn.Module):
    """Experts behind a linear layer."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 10)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.lin0(x))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(ROWS, 10)


NETS: dict[str, Any] = {
    "mlp": Mlp,
    "mlp-no-bias": lambda: Mlp(bias=False),
    "deep": Deep,
    "emb": EmbeddingConv1D,
    "conv1d": lambda: Convolution(1),
    "conv2d": lambda: Convolution(2),
    "conv2d-1x1": lambda: Convolution(2, kernel=1),
    "conv2d-stride": lambda: Convolution(2, kernel=(3, 2), stride=(2, 1), padding=(1, 0)),
    "conv2d-no-bias": lambda: Convolution(2, bias=False),
    "conv2d-groups": lambda: Convolution(2, channels=4, out=8, groups=2),
    "conv2d-depthwise": lambda: Convolution(2, channels=4, out=4, groups=4),
    "conv1d-groups": lambda: Convolution(1, channels=4, out=6, groups=2),
    "conv3d": lambda: Convolution(3),
    "conv3d-1x1": lambda: Convolution(3, kernel=1),
    "attention": Attention,
    "attention-first": lambda: Attention(batch_first=True, bias=False),
    "own": OwnParameters,
    "mixture": Mixture,
    "mixture-transposed": lambda: Mixture(transposed=True),
}


def net(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A module of the table above, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return NETS[name]().to(dtype).eval()


def batch(model: Any, seed: int = 5) -> Tensor:
    """A batch that `model` (or what PEFT wraps) takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = inner.inputs()
    return x.to(next(inner.parameters()).dtype) if x.is_floating_point() else x


@dataclass(frozen=True)
class Case:
    """One configuration. fields: of lorakit.LoRA; peft: what PEFT's LoraConfig wants besides, or instead."""

    model: str
    fields: dict[str, Any]
    peft: dict[str, Any] = field(default_factory=dict)

    def base(self, dtype: torch.dtype = torch.float64) -> Any:
        return net(self.model, dtype)

    def method(self) -> Any:
        return lk.LoRA(**self.fields)

    def config(self, **changes: Any) -> Any:
        from peft import LoraConfig

        values = {TO_PEFT.get(key, key): value for key, value in self.fields.items()}
        return LoraConfig(**{**values, **self.peft, **changes})


def case(model: str, targets: Any, peft: dict[str, Any] | None = None, **fields: Any) -> Case:
    return Case(model, {"r": 2, "alpha": 3, "target_modules": targets} | fields, peft or {})


STORED = {"fan_in_fan_out": True}  # PEFT warns that it sets it itself
DORA, BIASED = {"use_dora": True}, {"lora_bias": True, "alpha": 32}

CASES = {
    # targets
    "mlp-1-regex": case("mlp", "lin0"),
    "mlp-2": case("mlp", ["lin0"]),
    "mlp-3": case("mlp", ["lin1"]),
    "mlp-4": case("mlp", ["lin0", "lin1"]),
    "mlp-5-modules-to-save": case("mlp", ["lin0"], modules_to_save=["lin1"]),
    "mlp-5-head": case("mlp", ["lin0", "lin1"], modules_to_save=["head"]),
    "mlp-6-dropout": case("mlp", ["lin0"], alpha=4, dropout=0.1),
    "mlp-all-linear": case("mlp", "all-linear"),
    "mlp-exclude": case("mlp", "lin.*", exclude_modules=["lin1"]),
    "mlp-rank-above-width": case("mlp", ["head"], r=8),
    # biases
    "mlp-bias-all": case("mlp", ["lin0"], bias="all"),
    "mlp-bias-lora-only": case("mlp", ["lin0"], bias="lora_only"),
    "mlp-bias-lora-only-two": case("mlp", ["lin0", "lin1"], bias="lora_only"),
    "mlp-no-bias-all": case("mlp-no-bias", ["lin0"], bias="all"),
    "conv2d-bias-all": case("conv2d", ["conv"], bias="all"),
    "conv2d-bias-lora-only": case("conv2d", ["conv"], bias="lora_only"),
    "conv1d-bias-lora-only": case("emb", ["conv1d"], STORED, bias="lora_only"),
    # patterns and scaling
    "deep-rank-pattern": case("deep", ["up", "down"], rank_pattern={"down": 3}, alpha_pattern={"layers.1.up": 7}),
    "deep-rank-pattern-regex": case("deep", ["up", "down"], rank_pattern={r"layers\.[12]\.down": 1, "up": 4}),
    "deep-layers": case("deep", ["up"], layers_to_transform=[0, 2]),
    "deep-layers-pattern": case("deep", ["down"], layers_to_transform=1, layers_pattern="layers"),
    "deep-rslora": case("deep", ["up", "down"], use_rslora=True, rank_pattern={"down": 3}),
    "conv2d-rank-pattern-rslora": case("conv2d", ["conv", "lin0"], use_rslora=True, rank_pattern={"conv": 5}),
    "mlp-gaussian": case("mlp", ["lin0", "lin1"], init="gaussian"),
    # embeddings and Conv1D
    "emb-1-conv1d": case("emb", ["conv1d"], STORED),
    "emb-2": case("emb", ["emb"]),
    "emb-3-both": case("emb", ["emb", "conv1d"], STORED),
    "emb-tokens": case("emb", ["conv1d"], STORED, trainable_token_indices={"emb": [0, 10]}),
    "emb-tokens-any-order": case("emb", ["lin0"], trainable_token_indices={"emb": [12, 3, 7]}),
    "emb-modules-to-save": case("emb", ["conv1d"], STORED, modules_to_save=["emb"]),
    # convolutions
    "conv1d": case("conv1d", ["conv"]),
    "conv2d-1": case("conv2d", ["conv"]),
    "conv2d-2": case("conv2d", ["conv", "lin0"]),
    "conv2d-1x1": case("conv2d-1x1", ["conv"]),
    "conv2d-stride": case("conv2d-stride", ["conv"]),
    "conv2d-dropout": case("conv2d", ["conv"], dropout=0.2),
    "conv2d-modules-to-save": case("conv2d", ["conv"], modules_to_save=["lin0"]),
    "conv3d-1": case("conv3d", ["conv"]),
    "conv3d-2": case("conv3d", ["conv", "lin0"]),
    "conv3d-1x1": case("conv3d-1x1", ["conv"]),
    # DoRA
    "mlp-7-dora": case("mlp", ["lin0"], **DORA),
    "mlp-8-dora": case("mlp", ["lin0", "lin1"], **DORA),
    "mlp-9-dora": case("mlp", "lin1", alpha=32, **DORA),
    "mlp-dora-rslora": case("mlp", ["lin0", "lin1"], use_rslora=True, rank_pattern={"lin1": 3}, **DORA),
    "mlp-dora-dropout": case("mlp", ["lin0"], dropout=0.3, **DORA),
    "mlp-dora-bias-all": case("mlp", ["lin0"], bias="all", **DORA),
    "emb-1-dora": case("emb", ["conv1d"], STORED, **DORA),
    "emb-2-dora": case("emb", ["emb"], **DORA),
    "emb-3-dora": case("emb", ["emb", "conv1d"], STORED, **DORA),
    "conv1d-dora": case("conv1d", ["conv"], **DORA),
    "conv2d-1-dora": case("conv2d", ["conv"], **DORA),
    "conv2d-2-dora": case("conv2d", ["conv", "lin0"], **DORA),
    "conv2d-stride-dora": case("conv2d-stride", ["conv"], **DORA),
    "conv3d-1-dora": case("conv3d", ["conv"], **DORA),
    "conv3d-1x1-dora": case("conv3d-1x1", ["conv"], **DORA),
    # a bias of B
    "mlp-lora-bias": case("mlp", ["lin0", "lin1"], **BIASED),
    "conv2d-lora-bias": case("conv2d", ["conv"], **BIASED),
    "conv3d-lora-bias": case("conv3d", ["conv"], **BIASED),
    "emb-lora-bias": case("emb", ["conv1d"], STORED, **BIASED),
    # raw parameters
    "attention-1": case("attention", ["mha"]),
    "attention-2": case("attention", ["mha", "lin0"]),
    "attention-no-bias": case("attention-first", ["mha"]),
    "own-1": case("own", [], target_parameters=["lin0.weight"]),
    "own-2": case("own", [], target_parameters=["lin0.weight", "lin1.weight"]),
    "own-with-module": case("mlp", ["lin0"], target_parameters=["lin1.weight"]),
    "experts": case("mixture", [], target_parameters=["experts.up"]),
    "experts-two": case("mixture", ["lin0"], target_parameters=["experts.up", "experts.down"]),
    "experts-rslora": case("mixture", [], target_parameters=["experts.up", "experts.down"], use_rslora=True),
    "experts-transposed": case("mixture-transposed", [], target_parameters=["experts.up", "experts.down"]),
}
# PEFT's A is dense over a grouped convolution's groups, and PEFT cannot merge it; lorakit's is grouped as the layer is.
GROUPED = {
    "groups": case("conv2d-groups", ["conv"], r=4),
    "groups-with-linear": case("conv2d-groups", ["conv", "lin0"], r=4, bias="lora_only"),
    "depthwise": case("conv2d-depthwise", ["conv"], r=8),
    "groups-1d": case("conv1d-groups", ["conv"], r=4, use_rslora=True),
}
