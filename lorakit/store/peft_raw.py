"""PEFT's keys for pairs on raw parameters: experts' weights (target_parameters) and torch's attention layer.

Where several parameters of one module are adapted PEFT nests a wrapper a parameter, in the module's own order, so that
the first one's keys stand deepest: `experts.base_layer.lora_A.weight` is `gate_up_proj`'s and `experts.lora_A.weight` is
`down_proj`'s. An attention layer's input projection has `mha.lora_A.weight`, its output `mha.base_layer.out_proj.lora_A.weight`.
A: (E r, in), expert-major; B: (out, r E), expert-minor.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.kinds import is_attention
from lorakit.attach.method import Draft, Pair
from lorakit.errors import TargetError
from lorakit.methods.lora import LoRA
from lorakit.methods.start import raw_shape

DEEPER = ".base_layer"
IN, OUT = "in_proj_weight", "out_proj"
Raw = dict[str, dict[str, Pair]]


def raw_tensors(draft: Draft) -> dict[str, Tensor]:
    """The file's tensors of a draft's raw pairs, without the prefix."""
    tensors: dict[str, Tensor] = {}
    for path, group in draft.raw.items():
        for key, name in _keys(path, list(group), _of_attention(path, draft)).items():
            tensors[f"{key}.lora_A.weight"] = group[name].A
            tensors[f"{key}.lora_B.weight"] = group[name].Bt.t()
    return tensors


def _of_attention(path: str, draft: Draft) -> bool:
    """Whether a raw parameter at `path` is the output projection of an attention layer."""
    parent, _, last = path.rpartition(".")
    return last == OUT and IN in draft.raw.get(parent, {})


def _keys(path: str, names: list[str], of_attention: bool) -> dict[str, str]:
    """Key in the file -> parameter name."""
    if of_attention:
        parent = path.removesuffix(f".{OUT}")
        return {f"{parent}{DEEPER}.{OUT}": names[0]}
    return {path + DEEPER * (len(names) - 1 - i): name for i, name in enumerate(names)}


def raw_draft(
    pairs: Mapping[str, Mapping[int, Tensor]],
    method: LoRA,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    faults: list[str],
) -> tuple[Raw, set[str]]:
    """(module path -> parameter -> pair, the keys in the file that these took) of a file's pairs. Adds to `faults`.

    modules: the model's, by path.
    """
    raw: Raw = {}
    taken: set[str] = set()
    for key, (path, name) in _expected(pairs, method, model, modules, faults).items():
        halves = pairs.get(key, {})
        taken.add(key)
        if len(halves) < 2:
            faults.append(f"{path}.{name}: named by target_parameters, but the file has no tensors for it ({key})")
            continue
        fault = _fault(model.get_submodule(path), name, halves[0], halves[1], method.rank(path))
        if fault:
            faults.append(f"{path}.{name}: {fault}")
        else:
            pair = Pair(halves[0], halves[1].t(), method.scaling(path))
            raw.setdefault(path, {})[name] = pair
    return raw, taken


def _expected(
    pairs: Mapping[str, object],
    method: LoRA,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    faults: list[str],
) -> dict[str, tuple[str, str]]:
    """Key in the file -> (module path, parameter name)."""
    found: dict[str, tuple[str, str]] = {}
    groups: dict[str, list[str]] = {}
    try:
        for path, name in method.raw_targets(model):
            groups.setdefault(path, []).append(name)
    except TargetError as error:
        faults.append(str(error))
    for path, names in groups.items():
        found |= {key: (path, name) for key, name in _keys(path, names, False).items()}
    for path in pairs:
        module = modules.get(path)
        if module is not None and is_attention(plain(type(module))):
            found[path] = (path, IN)
            found[f"{path}{DEEPER}.{OUT}"] = (f"{path}.{OUT}", "weight")
    return found


def _fault(module: nn.Module, name: str, a: Tensor, b: Tensor, r: int) -> str | None:
    parameter = module._parameters.get(name)
    if parameter is None or parameter.dim() not in (2, 3):
        return "the model has no such matrix, or stack of matrices"
    experts, d_in, d_out = raw_shape(module, parameter)
    if a.shape == (experts * r, d_in) and b.shape == (d_out, experts * r):
        return None
    return (
        f"the model has {experts} of {d_in} -> {d_out}, which at rank {r} take lora_A {[experts * r, d_in]} and lora_B "
        f"{[d_out, experts * r]}, but the file has {list(a.shape)} and {list(b.shape)}"
    )
