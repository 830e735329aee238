"""Short names of a block's matrices (q, k, v, o, gate, up, down) to the names that an architecture gives them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import is_within, output_head, walk
from lorakit.attach.kinds import LinearKind, low_rank_kind
from lorakit.attach.targets import matches, shortest_names
from lorakit.errors import TargetError
from lorakit.methods.lora import LoRA

SHORT: Mapping[str, str] = {
    "q": r"q_proj|query|query_proj|q_lin|wq|SelfAttention\.q|EncDecAttention\.q",
    "k": r"k_proj|key|key_proj|k_lin|wk|SelfAttention\.k|EncDecAttention\.k",
    "v": r"v_proj|value|value_proj|v_lin|wv|SelfAttention\.v|EncDecAttention\.v",
    "o": r"o_proj|out_proj|out_lin|attn\.c_proj|attention\.output\.dense|SelfAttention\.o|EncDecAttention\.o|attention\.dense",
    "gate": r"gate_proj|wi_0",
    "up": r"up_proj|c_fc|fc1|intermediate\.dense|wi|wi_1|lin1|dense_h_to_4h",
    "down": r"down_proj|mlp\.c_proj|fc2|layer\.\d+\.output\.dense|wo|lin2|dense_4h_to_h",
}
"""Regular expressions of a path's end. Wq, Wk, Wv, Wo of the LoRA paper, section 4.2, and the feed-forward matrices."""
FUSED: Mapping[str, tuple[str, ...]] = {
    "c_attn": (
        "GPT2Attention",
        "DecisionTransformerGPT2Attention",
        "ImageGPTAttention",
        "Attention",
    ),  # the last: OpenAI GPT
    "qkv_proj": ("Phi3Attention",),
    "Wqkv": ("MptAttention", "ModernBertAttention"),
    "qkv": (),
}
"""Projections that hold q, k and v in this order, in three equal parts: name -> the classes whose child it is, () = of any.
Others of these names are cut head by head (GPT-BigCode), in another order (CodeGen), or hold something else."""
PARTS = ("q", "k", "v")


def spelt_out(method: LoRA, model: nn.Module) -> LoRA:
    """`method` with short names in target_modules replaced by those of `model`; a name that the model itself has stays.

    Where q, k, v are one fused matrix, its parts are adapted (enable_lora). Raises TargetError for a matrix that is not there.
    """
    if isinstance(method.target_modules, str):
        return method
    linear = _linear(model)
    own = [name for name in method.target_modules if name not in SHORT or any(matches([name], path) for path in linear)]
    short = [name for name in method.target_modules if name not in own]
    found = {name: [path for path in linear if _ends(SHORT[name], path)] for name in short}
    missing = [name for name, paths in found.items() if not paths]
    fused = [path for path in linear if _is_fused(model, path)]
    absent = [name for name in missing if not fused or name not in PARTS]
    if absent:
        names = sorted({re.sub(r"\.\d+\.", ".N.", path) for path in linear})
        raise TargetError(
            f"{type(model).__name__} has no matrix known as {', '.join(absent)}. Name it as the model does: {', '.join(names)}."
        )
    paths = [path for some in found.values() for path in some] + (fused if missing else [])
    enabled: dict[str, Sequence[bool]] = dict(method.enable_lora)
    for path in fused if missing else []:
        enabled.setdefault(path.rpartition(".")[2], [part in missing for part in PARTS])
    names = [*own, *shortest_names(model, paths)] if paths else own
    return replace(method, target_modules=names, enable_lora=enabled)


def _linear(model: nn.Module) -> list[str]:
    """The paths of the linear layers, less the output head's."""
    head = output_head(model)
    return [
        path
        for path, module in walk(model)
        if isinstance(low_rank_kind(plain(type(module))), LinearKind) and not (head and is_within(path, head))
    ]


def _ends(pattern: str, path: str) -> bool:
    return re.search(rf"(^|\.)({pattern})$", path) is not None


def _is_fused(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    if name not in FUSED or not _thirds(model.get_submodule(path)):
        return False
    return not FUSED[name] or plain(type(model.get_submodule(parent))).__name__ in FUSED[name]


def _thirds(module: nn.Module) -> bool:
    """Whether one side of the weight is three times the other: q, k and v of one width."""
    sides = sorted(module._parameters["weight"].shape)  # type: ignore[union-attr]
    return len(sides) == 2 and sides[1] == 3 * sides[0]
