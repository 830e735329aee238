"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a prompt that a small encoder makes while it is trained.

What is kept in the end is the encoder's output: a folder holds the prompt alone, and a loaded adapter is trained further
without an encoder. The encoders are PEFT's (and NVIDIA NeMo's): an MLP of three layers, or a bidirectional LSTM and two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.attach.method import Draft, Insert, Method
from lorakit.errors import UsageError
from lorakit.methods.body import backbone, check_length, check_room, embedding_of, fresh
from lorakit.methods.kept import check_kept, keep
from lorakit.methods.prompt import Prompt

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True)
class PTuning(Method):
    """`length` vectors in front of each input, made by an encoder from trained ones. PEFT's P_TUNING folders."""

    name: ClassVar[str] = "p-tuning"
    learning_rate: ClassVar[float] = 1.0e-3

    length: int = 20
    """How many virtual tokens; they take as many positions."""
    encoder: str = "lstm"
    """What makes them: "lstm" (the paper's) or "mlp"."""
    hidden: int | None = None
    """The encoder's width; None = that of the embeddings."""
    layers: int = 2
    """Layers of the LSTM."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        check_length("length", self.length)
        check_length("layers", self.layers)
        check_kept(self.modules_to_save)
        if self.hidden is not None:
            check_length("hidden", self.hidden)
        if self.encoder not in ENCODERS:
            raise UsageError(f"encoder must be one of {', '.join(ENCODERS)}, not {self.encoder!r}.")

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        path, body = backbone(model, "P-tuning")
        check_room(model, self.length, "a prompt")
        like = embedding_of(body).weight
        shapes = encoder_shapes(self.encoder, like.shape[1], self.hidden or like.shape[1], self.layers)

        def drawn(shape: tuple[int, ...], **how: float) -> Tensor:
            return fresh(shape, like, dtype=dtype, generator=generator, **how)

        # The bounds of nn.Linear and nn.LSTM; the vectors that go in start as nn.Embedding's.
        tensors = {name: drawn(shape, bound=fan**-0.5) for name, (shape, fan) in shapes.items()}
        tensors["vectors"] = drawn((self.length, like.shape[1]), std=1.0)
        layers = self.layers if self.encoder == "lstm" else 0
        insert = Insert(EncodedPrompt.on(body, self.length, 0, layers=layers), tensors)
        return keep(Draft(inserts={path: {"prompt": insert}}), model, self.modules_to_save)


def encoder_shapes(encoder: str, dim: int, hidden: int, layers: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """name -> (shape, what its first values are bounded by: 1 / sqrt of it) of an encoder's tensors."""
    shapes: dict[str, tuple[tuple[int, ...], int]] = {}
    widths = [dim, hidden, hidden, dim] if encoder == "mlp" else [2 * hidden, 2 * hidden, dim]
    for layer in range(layers if encoder == "lstm" else 0):
        for way in ("", "_reverse"):
            width = dim if layer == 0 else 2 * hidden
            shapes[f"weight_ih_l{layer}{way}"] = ((4 * hidden, width), hidden)
            shapes[f"weight_hh_l{layer}{way}"] = ((4 * hidden, hidden), hidden)
            shapes[f"bias_ih_l{layer}{way}"] = ((4 * hidden,), hidden)
            shapes[f"bias_hh_l{layer}{way}"] = ((4 * hidden,), hidden)
    for number, (inner, outer) in enumerate(pairwise(widths)):
        shapes[f"linear{number}_weight"] = ((outer, inner), inner)
        shapes[f"linear{number}_bias"] = ((outer,), inner)
    return shapes


@dataclass(frozen=True)
class EncodedPrompt(Prompt):
    """A prompt whose vectors come out of an encoder. layers: the LSTM's; 0 = an MLP alone."""

    layers: int

    def vectors(self, module: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = tensors["vectors"]
        if self.layers:
            x = self._recurrent(x, tensors)
        last = max(int(name[6:-7]) for name in tensors if name.startswith("linear") and name.endswith("_weight"))
        for number in range(last + 1):
            x = F.linear(x, tensors[f"linear{number}_weight"], tensors[f"linear{number}_bias"])
            x = F.relu(x) if number < last else x
        return x, x.new_empty(0, x.shape[-1])

    def _recurrent(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """(length, dim) -> (length, 2 hidden): the states of both ways beside one another."""
        weights = [
            tensors[f"{name}_l{layer}{way}"]
            for layer in range(self.layers)
            for way in ("", "_reverse")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        start = x.new_zeros(2 * self.layers, 1, weights[1].shape[1])
        # Its few vectors are no work to save precision on, and torch has no LSTM in bfloat16 on every CPU.
        with torch.autocast(x.device.type, enabled=False):
            # input, states, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first
            out = torch.lstm(
                x[None], (start, start), weights, True, self.layers, 0.0, torch.is_grad_enabled(), True, True
            )
        return out[0][0]
