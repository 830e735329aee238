"""Quantise a loaded base, so that a large model can be adapted in little memory.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3): the frozen weights stand in 4 bits, each layer widens its own
for the product, and gradients go through them to adapters in full precision. Every linear layer but the output head is
quantised (and but what transformers keeps in float32: T5's `wo`); embeddings, norms and biases keep their type. Quantise
before attach.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lorakit.attach.anatomy import is_within, output_head
from lorakit.attach.quantized import is_quantized, stored_bytes
from lorakit.errors import ModelError, UsageError
from lorakit.models.quiet import quiet

QUANTIZATIONS = {
    "nf4": "bitsandbytes",  # 4-bit NormalFloat in blocks of 64 (see BLOCKS), the blocks' scales in 8 bits (double quantisation)
    "fp4": "bitsandbytes",  # the same with 4-bit floats
    # bitsandbytes' 8-bit layer rounds its inputs too (LLM.int8()), torchao's weights alone: exact for the frozen base
    "int8": "torchao",  # a scale for each output
    # None of torchao's packed int4 layouts has a gradient (0.18), and none runs on a CPU: this one keeps a value a byte
    "int4": "torchao",  # a scale for each 32 inputs
}
"""How a base can be quantised, and the package that does it."""
INT4_GROUP = 32
BLOCKS = (64, 32)
"""Values of a 4-bit block: QLoRA's 64; on a CPU 32 where 64 do not divide a row (see _block)."""


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantised. bytes_before, bytes_after: of all the model's parameters, scales included."""

    kind: str
    modules: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"{self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB"
        return f"{len(self.modules):,} linear layers of the base are quantised to {self.kind}: {sizes}"


def check_quantization(kind: str) -> None:
    """Raise UsageError for a kind that is unknown, ModelError where its package is not installed."""
    if not isinstance(kind, str) or kind not in QUANTIZATIONS:  # a file may say anything
        raise UsageError(f"quantize {kind!r} is unknown; expected one of: {', '.join(QUANTIZATIONS)}.")
    package = QUANTIZATIONS[kind]
    if find_spec(package) is None:
        raise ModelError(
            f"a base in {kind} needs {package}, which is not installed. Install it: pip install 'lorakit[quantized]' "
            f"(or pip install {package})."
        )


def quantize_base(model: nn.Module, kind: str, *, device: torch.device | None = None) -> QuantizeReport:
    """Quantise the linear layers of `model` in place, layer by layer; what is quantised moves to `device` on the way.

    kind: a key of QUANTIZATIONS. nf4 and fp4 take about 0.52 bytes a weight, int8 1, int4 1.2 (a value a byte: for
    adapters of a base that will be served in int4; nf4 is what saves memory). The layers compute in their weights' type.
    Raises UsageError, and ModelError where the package is missing or cannot do it, or where nothing is to be quantised.
    """
    check_quantization(kind)
    before = _bytes(model)
    paths = _linear_paths(model, kind)
    try:
        with quiet(progress=False):
            _WAYS[kind](model, paths, device)
    except ModelError:
        raise
    except Exception as error:  # either package raises whatever its kernels do
        raise ModelError(
            f"{QUANTIZATIONS[kind]} cannot quantise this {type(model).__name__} to {kind} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})."
        ) from error
    return QuantizeReport(kind, tuple(paths), before, _bytes(model))


def _linear_paths(model: nn.Module, kind: str) -> list[str]:
    """Every nn.Linear but the output head's and those that transformers keeps in float32 (T5's wo: its module reads the
    weight's type). A subclass has a forward or a reader of its own, and is left alone."""
    held = next((name for name, parameter in model.named_parameters() if is_quantized(parameter)), None)
    if held is not None:
        raise ModelError(f"this model is quantised already ({held}). Leave `quantize` out.")
    head, kept = output_head(model), _kept_names(model)
    paths = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and (head is None or not is_within(path, head))
        and kept.isdisjoint(path.split("."))
    ]
    if not paths:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to quantise besides its output head (GPT-2's Conv1D layers cannot "
            "be). Leave `quantize` out."
        )
    narrow = [path for path in paths if model.get_submodule(path).weight.shape[1] % INT4_GROUP]  # type: ignore[index,union-attr]
    if kind == "int4" and narrow:
        raise ModelError(
            f"int4 groups {INT4_GROUP} inputs, and {narrow[0]} (of {len(narrow)} such layers) has a number of inputs that "
            f"{INT4_GROUP} does not divide. Use nf4."
        )
    return paths


def _kept_names(model: nn.Module) -> set[str]:
    """Names of modules that transformers' own quantisers leave alone too."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return set()
    return {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}


def _to_4bit(kind: str, model: nn.Module, paths: list[str], device: torch.device | None) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path in paths:
        linear: Any = model.get_submodule(path)
        weight, bias = linear.weight, linear.bias
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=True,
            quant_type=kind,
            device=torch.device("meta"),
        )
        # On some CPUs an evaluation would repack the weight, after which training takes no gradient through it.
        layer.support_avx512bf16_for_cpu = False
        place = device or weight.device
        packed = Params4bit(
            weight.detach(),
            requires_grad=False,
            compress_statistics=True,
            blocksize=_block(linear.in_features, place),
            quant_type=kind,
            module=layer,
        )
        layer.weight, layer.bias = packed.to(place), bias
        _check_blocks(path, weight, layer.weight)
        layer.train(linear.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)


def _block(width: int, device: torch.device) -> int:
    """Values that share a scale. bitsandbytes' AVX-512 kernels (0.50.2) give a block that goes on in the next row the scale of
    another, so on a CPU blocks end with their row where they can."""
    return BLOCKS[1] if device.type == "cpu" and width % BLOCKS[0] and not width % BLOCKS[1] else BLOCKS[0]


@torch.no_grad()
def _check_blocks(path: str, weight: torch.Tensor, packed: Any) -> None:
    """Raise ModelError where a CPU's kernels read a packed matrix, whose blocks go over its rows' ends, as another one."""
    block = packed.blocksize
    if packed.device.type != "cpu" or not weight.shape[1] % block:
        return
    from bitsandbytes.functional import dequantize_4bit

    largest = nn.functional.pad(weight.detach().flatten().float().abs(), (0, -weight.numel() % block))
    bound = largest.view(-1, block).amax(1, keepdim=True).expand(-1, block).flatten()[: weight.numel()]
    error = (dequantize_4bit(packed.data, packed.quant_state).float() - weight.float().cpu()).abs().flatten()
    if (error > 0.25 * bound.cpu() + 1e-6).any():  # the widest gap between levels is a third
        raise ModelError(
            f"bitsandbytes reads {path} wrongly on this CPU: expected values within 0.25 of their block's largest, came "
            f"{float((error / bound.cpu().clamp_min(1e-12)).max()):.2f}. Its {weight.shape[1]} inputs are no multiple of "
            f"{BLOCKS[1]}. Use int8, or a GPU."
        )


def _to_int8(model: nn.Module, paths: list[str], device: torch.device | None) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    _with_torchao(Int8WeightOnlyConfig(set_inductor_config=False), model, paths, device)


def _to_int4(model: nn.Module, paths: list[str], device: torch.device | None) -> None:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(INT4_GROUP))
    _with_torchao(config, model, paths, device)


def _with_torchao(config: Any, model: nn.Module, paths: list[str], device: torch.device | None) -> None:
    from torchao.quantization import quantize_

    chosen = set(paths)
    quantize_(model, config, filter_fn=lambda module, path: path in chosen, device=device)


_WAYS: dict[str, Callable[[nn.Module, list[str], torch.device | None], None]] = {
    "nf4": partial(_to_4bit, "nf4"),
    "fp4": partial(_to_4bit, "fp4"),
    "int8": _to_int8,
    "int4": _to_int4,
}


def _bytes(model: nn.Module) -> int:
    return sum(stored_bytes(parameter) for parameter in model.parameters())
