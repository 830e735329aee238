"""Matrix products of training by the faster of the two libraries inside torch's CPU build.

On x86 torch's own products in float32 are MKL's. On processors that are not Intel's those stay behind oneDNN's, which the
same build carries and torch.compile calls: base products at 1,024 tokens 1.1 to 1.2 times, low-rank ones 2 to 3 times, a
vocabulary's logits 1.7 times (bench/gemm.py, docs/benchmarks.md). The choice depends on the processor and on shapes alone,
never on a trial, so that a resumed run has the bits of one that was not stopped.

oneDNN makes code for each shape that it meets and keeps it: 0.6 MB and 0.7 ms. So it is given numbers of tokens that are
`aligned` alone, of which there are sixteen between one power of two and the next; packed rows are padded to such numbers.

`LORAKIT_GEMM=torch` or `onednn` in the environment chooses for every product instead; the default is `auto`.
"""

import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import UsageError

NAMES = ("auto", "torch", "onednn")
LEAST = 2**21  # multiply-adds; a smaller product gains less than the look for oneDNN's kernel costs
PER_OCTAVE = 16  # numbers of tokens between a power of two and the next
SKINNY = 64  # rows up to which oneDNN's AVX2 kernels read a weight in either order well


def aligned(count: int) -> int:
    """The least number from `count` on that oneDNN is given: at most 1/16 more, a third of that on average."""
    step = max(1, (1 << count.bit_length() >> 1) // PER_OCTAVE)
    return -(-count // step) * step


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tokens: int | None = None) -> Tensor:
    """`x weight^T + bias`, outside of autograd. x: (rows, in); weight: (out, in), in any strides; returns (rows, out).

    tokens: the side of the product that differs from batch to batch; None = rows.
    """
    if by_onednn(x, weight, x.shape[0] if tokens is None else tokens):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return torch.nn.functional.linear(x, weight, bias)


def scaled_product(x: Tensor, weight: Tensor, scale: float, out: Tensor, *, tokens: int) -> Tensor:
    """`out = scale x weight^T`, outside of autograd; returns out. x: (rows, in); weight: (n, in); out: (rows, n), whose
    values are not read. tokens: see product."""
    if by_onednn(x, weight, tokens):
        return torch.mul(product(x, weight, tokens=tokens), scale, out=out)
    return out.addmm_(x, weight.t(), beta=0, alpha=scale)  # the scale costs no pass of its own


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, exact: bool) -> Tensor:
    """A frozen layer's own output. x: (..., in); weight: (out, in), or (in, out) where `transposed` (Conv1D).

    exact: with the very bits that the layer itself gives, which oneDNN's are not.
    """
    if not exact:
        x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = product(x2, weight.t() if transposed else weight, bias)
    elif not transposed:
        return torch.nn.functional.linear(x, weight, bias)
    else:
        x2 = x.reshape(-1, x.shape[-1])
        y = torch.addmm(bias, x2, weight) if bias is not None else x2 @ weight
    return y.view(*x.shape[:-1], y.shape[-1])


def base_gradient(dy: Tensor, weight: Tensor, transposed: bool, onto: Tensor | None = None) -> Tensor:
    """The gradient `dy W` of a frozen layer's input, (tokens, in), added to `onto` in place where there is one.

    dy: (tokens, out); weight: as base_product has it.
    """
    W = weight if transposed else weight.t()  # (in, out)
    if onto is None:
        return product(dy, W)
    return onto.add_(product(dy, W)) if by_onednn(dy, W, dy.shape[0]) else onto.addmm_(dy, W.t())


def by_onednn(x: Tensor, weight: Tensor, tokens: int) -> bool:
    """Whether this product of two matrices goes to oneDNN. tokens: see product."""
    if (
        x.shape[0] * weight.numel() < LEAST  # most are: the quickest to tell comes first
        or aligned(tokens) != tokens
        or x.dtype != torch.float32
        or x.device.type != "cpu"
    ):
        return False
    if backend() != "onednn" or x.stride(-1) != 1:
        return False
    return weight.stride(-1) == 1 or x.shape[0] <= SKINNY or torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def backend() -> str:
    """ "torch" or "onednn": what large products in float32 on this CPU are computed by. Raises UsageError for an unknown
    LORAKIT_GEMM, and for `onednn` where this torch has none."""
    asked = os.environ.get("LORAKIT_GEMM", "auto")
    if asked not in NAMES:
        raise UsageError(f"LORAKIT_GEMM={asked!r}: expected one of {', '.join(NAMES)}.")
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    if asked == "onednn" and not there:
        raise UsageError("LORAKIT_GEMM=onednn: this build of torch has no oneDNN. Take auto or torch.")
    if asked != "auto":
        return asked
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return "onednn" if there and mkl and "Intel" not in processor() else "torch"


def processor() -> str:
    """Who made this CPU, as it says itself: "GenuineIntel", "AuthenticAMD"; where no one tells, "" or what Python knows."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="replace").splitlines() if about.exists() else []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return told[0] if told else platform.processor()
