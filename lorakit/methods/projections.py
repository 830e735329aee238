"""Where adapters of a block go: on its attention's output projection, on its feed-forward part's, on the block itself.

Found by the names that model families give these layers inside a block; names of the caller's own come first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import block_lists, walk
from lorakit.attach.kinds import LinearKind, low_rank_kind
from lorakit.attach.targets import matches
from lorakit.errors import TargetError, UsageError

ATTENTION = (  # below a block; numbers of its parts left out (T5's layer.0.SelfAttention.o)
    "attn.c_proj", "attention.output.dense", "self_attn.o_proj", "self_attn.out_proj", "attention.dense",
    "attention.out_proj", "attn.out_proj", "attn.proj", "self_attention.dense", "attention.o_proj", "attention.out_lin",
    "layer.SelfAttention.o",
)  # fmt: skip
MLP = (
    "mlp.c_proj", "output.dense", "mlp.down_proj", "fc2", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "ffn.lin2",
    "layer.DenseReluDense.wo",
)  # fmt: skip
Names = str | Sequence[str] | None


@dataclass(frozen=True)
class Projections:
    """The paths of one block: itself, the linear layer that its attention ends in, and its feed-forward part's."""

    block: str
    attention: str
    mlp: str


def find_projections(model: nn.Module, attention: Names = None, mlp: Names = None) -> list[Projections]:
    """The output projections of each block of `model`, in the order in which blocks run (an encoder's before a decoder's).

    attention, mlp: their names, matched as target_modules are; None = the families' own. Raises TargetError where the
    model has no blocks, or one of them no such layer, or several.
    """
    paths = [f"{path}.{number}" for path, stack in block_lists(model) for number in range(len(stack))]
    if not paths:
        raise TargetError(
            f"{type(model).__name__} has no list of blocks in which attention and feed-forward parts could be found, so an "
            "adapter has no place there. LoRA (lorakit.LoRA) takes any linear layer by its name."
        )
    return [
        Projections(path, _only(model, path, attention, ATTENTION, "attention"), _only(model, path, mlp, MLP, "mlp"))
        for path in paths
    ]


def _only(model: nn.Module, block: str, given: Names, known: Sequence[str], what: str) -> str:
    """The one layer of `block` that the names name."""
    leaves = [
        path
        for path, module in walk(model.get_submodule(block))
        if path and isinstance(low_rank_kind(plain(type(module))), LinearKind)
    ]
    if given is not None:
        hits = [path for path in leaves if matches(given, f"{block}.{path}")]
    else:
        hits = [path for path in leaves if _unnumbered(path) in known]
    if len(hits) == 1:
        return f"{block}.{hits[0]}"
    came = f"several ({', '.join(hits)})" if hits else "none"
    raise TargetError(
        f"{type(model).__name__}: the output projection of {block}'s {what} is not known: of its linear layers "
        f"({', '.join(leaves)}) {came} {'matched' if given is not None else 'bears a known name of it'}. Name the one in each "
        f"block: {what}=['name']."
    )


def _unnumbered(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdigit())


def check_projections(attention: object, mlp: object) -> None:
    """Raise UsageError where the names are none."""
    for key, value in (("attention", attention), ("mlp", mlp)):
        listed = isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) for one in value)
        if value is not None and not isinstance(value, str) and not listed:
            raise UsageError(f"{key} must be names of layers, or a regular expression over whole paths, not {value!r}.")
