"""BitFit (Zaken et al. 2021, arXiv 2106.10199, section 3): every bias of the model is trained, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lorakit.attach.anatomy import named_parameter_owners
from lorakit.attach.method import Draft, Method
from lorakit.errors import TargetError
from lorakit.methods.kept import Place, add_copies, check_kept, in_order, kept_places


@dataclass(frozen=True)
class BitFit(Method):
    """A trained copy of every bias, LayerNorms' included. The copies keep the base's dtype.

    Raises TargetError for a model without biases (Llama and its kin): there is nothing to train.
    """

    name: ClassVar[str] = "bitfit"
    learning_rate: ClassVar[float] = 1.0e-3  # Hu et al. 2021, table 12: 1.6e-3

    modules_to_save: Sequence[str] | None = None
    """Modules trained in full and kept with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        check_kept(self.modules_to_save)

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        biases = [place for place in named_parameter_owners(model) if is_bias(place[1])]
        kept = kept_places(model, self.modules_to_save)
        if not set(biases) - set(kept):
            raise TargetError(
                f"{type(model).__name__} has no biases{' but those of modules_to_save' if biases else ''}, and BitFit trains "
                "nothing else. Choose another method: LoRA with a small r has as few parameters."
            )
        draft = Draft()
        places: list[Place] = in_order(model, biases + kept)
        add_copies(draft, model, places, "BitFit")
        return draft


def is_bias(name: str) -> bool:
    """Whether a parameter of this name (without its module's) is a bias: "bias", torch's "in_proj_bias" and "bias_hh"."""
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")
