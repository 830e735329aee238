"""Which leaves an adapter goes to: PEFT's matching rules, with silence turned into errors.

A list of names matches a module path exactly or by `.suffix`; a string is a regular expression over the whole path;
"all-linear" is every linear layer but the output head. rank_pattern and alpha_pattern: `(.*\\.)?(key)$`, first match wins.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import is_within, output_head, walk
from lorakit.attach.kinds import KINDS, LinearKind, is_attention, is_never_called, low_rank_kind
from lorakit.errors import TargetError

ALL_LINEAR = "all-linear"
T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """What to match: see the fields of the same names in lorakit.LoRA."""

    target: str | Sequence[str]
    exclude: str | Sequence[str] | None = None
    layers: Sequence[int] | None = None
    layers_pattern: Sequence[str] | None = None
    kept_whole: Sequence[str] = ()  # paths that are trained in full (modules_to_save); nothing below them is matched


def matches(pattern: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression over the whole path, a list names paths or their last parts."""
    if isinstance(pattern, str):
        return expression(pattern).fullmatch(path) is not None
    return any(path == name or path.endswith("." + name) for name in pattern)


def expression(pattern: str) -> re.Pattern[str]:
    """The compiled regular expression. Raises TargetError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{pattern!r} is no regular expression: {error}.") from error


def layer_number(path: str, patterns: Sequence[str] | None) -> int | None:
    """The number of the layer that `path` lies in: after one of `patterns` ("h", "layers"), else the first number in it."""
    for pattern in patterns or [r"[^.]*"]:
        found = expression(rf"(?:^|.*?\.){pattern}\.(\d+)\.").match(
            path
        )  # lazy: the layer's number, not an expert's inside it
        if found:
            return int(found[found.re.groups])
    return None


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value for `path` in a rank or alpha pattern: the first key that matches the path's end, else `default`."""
    for key, value in patterns.items():
        if expression(rf"(.*\.)?({key})$").match(path):
            return value
    return default


def find_targets(
    model: nn.Module, selection: Selection, modules: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """path -> leaf to adapt, in the model's order. Raises TargetError where nothing, or the wrong thing, matches.

    modules: the model's, by path, where the caller has them.
    """
    wanted = _Wanted(model, selection)
    all_modules = walk(model) if modules is None else modules.items()
    found = {path: module for path, module in all_modules if path and wanted(path, module)}
    if not found:
        raise TargetError(_nothing_matched(model, selection))
    for path, module in found.items():
        _check_supported(path, module)
        parent, _, name = path.rpartition(".")
        if name in ("linear1", "linear2"):
            _check_called(model.get_submodule(parent), path)
    return found


class _Wanted:
    """Whether a selection means a module; what is the same for all modules is worked out once."""

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        self.selection = selection
        self.all_linear = selection.target == ALL_LINEAR
        self.head = output_head(model) if self.all_linear else None
        self.listed = frozenset(() if isinstance(selection.target, str) else selection.target)
        self.endings = tuple(f".{name}" for name in self.listed)
        self.linear: dict[type, bool] = {}

    def __call__(self, path: str, module: nn.Module) -> bool:
        selection = self.selection
        if self.all_linear:
            if not self._is_linear(type(module)) or (self.head and is_within(path, self.head)):
                return False
        elif self.listed:
            if path not in self.listed and not path.endswith(self.endings):
                return False
        elif not matches(selection.target, path):
            return False
        if any(is_within(path, kept) for kept in selection.kept_whole):
            return False
        if selection.exclude is not None and matches(selection.exclude, path):
            return False
        if selection.layers is None or path in self.listed:  # a whole path names its own layer
            return True
        return layer_number(path, selection.layers_pattern) in selection.layers

    def _is_linear(self, cls: type) -> bool:
        if cls not in self.linear:
            self.linear[cls] = isinstance(low_rank_kind(plain(cls)), LinearKind)
        return self.linear[cls]


def find_parameters(model: nn.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """(module path, parameter name) of the parameters whose full names end in one of `names`, for target_parameters."""
    if not names:
        return []
    owners = [(full, *full.rpartition(".")[::2]) for full, _ in model.named_parameters(remove_duplicate=False)]
    found = [(path, name) for full, path, name in owners if matches(list(names), full) and not name.startswith("lora_")]
    missed = [one for one in names if not any(matches([one], full) for full, _, _ in owners)]
    if missed:
        ends = sorted({".".join(full.split(".")[-2:]) for full, _, _ in owners})
        near = difflib.get_close_matches(missed[0], ends, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else f" It has {', '.join(ends[:20])}."
        raise TargetError(f"target_parameters names {missed[0]!r}, which {type(model).__name__} does not have.{hint}")
    return found


def _check_called(parent: nn.Module, path: str) -> None:
    """Raise where PyTorch's encoder layer would read a layer's weight in evaluation, and never call it."""
    fast = isinstance(parent, nn.TransformerEncoderLayer) and parent.self_attn.batch_first
    if fast and parent.activation_relu_or_gelu and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"{path} lies in a {type(parent).__name__} of PyTorch's, whose fast path for evaluation reads its weight without "
            "calling it: an adapter there would be ignored. Call torch.backends.mha.set_fastpath_enabled(False) and leave it "
            "so, or leave the layer out with exclude_modules (self_attn can be adapted either way)."
        )


def _check_supported(path: str, module: nn.Module) -> None:
    cls = plain(type(module))
    if is_attention(cls):
        return
    if low_rank_kind(cls) is not None and module._parameters.get("weight") is None:
        raise TargetError(
            f"{path} ({cls.__name__}) has no weight parameter of its own (a parametrization or weight norm makes it from "
            "others). Remove that first, or leave the layer out with exclude_modules."
        )
    if is_never_called(cls):
        raise TargetError(
            f"{path} is a {cls.__name__}: its parent reads its weight without calling it, so an adapter there would be "
            "ignored. Leave it out with exclude_modules."
        )
    if low_rank_kind(cls) is None:
        supported = ", ".join(name.rpartition(".")[2] for name in KINDS)
        raise TargetError(
            f"{path} matches target_modules but is a {cls.__name__}, which takes no low-rank update (supported: {supported}). "
            "Name the layers inside it, or leave it out with exclude_modules."
        )


def _nothing_matched(model: nn.Module, selection: Selection) -> str:
    paths = [path for path, module in model.named_modules() if low_rank_kind(plain(type(module))) is not None]
    names = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()})
    message = f"no module of {type(model).__name__} matches target_modules={selection.target!r}"
    limits = [
        f"{key}={value!r}"
        for key, value in (("exclude_modules", selection.exclude), ("layers_to_transform", selection.layers))
        if value is not None
    ]
    message += f" with {' and '.join(limits)}." if limits else "."
    asked = [selection.target] if isinstance(selection.target, str) else list(selection.target)
    near = sorted({name for one in asked for name in difflib.get_close_matches(one.rpartition(".")[2], names)})
    message += f" Did you mean {', '.join(near)}?" if near else ""
    return message + f" Layers of this model that can be adapted: {', '.join(names) or 'none'}."


def find_modules(model: nn.Module, names: Sequence[str], key: str = "modules_to_save") -> list[str]:
    """The paths of the modules that `names` name. key: whose names they are. A name that matches nothing is an error."""
    if not names:
        return []
    paths = [path for path, _ in model.named_modules() if path]
    found = []
    for name in names:
        matched = [path for path in paths if matches([name], path)]
        if not matched:
            children = ", ".join(child for child, _ in model.named_children())
            raise TargetError(
                f"{key} names {name!r}, which {type(model).__name__} does not have. Its parts are: {children}."
            )
        found += [path for path in matched if path not in found]
    return found


def shortest_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The shortest list of names that matches just `paths` in `model`: last parts where they suffice, else the paths."""
    chosen = set(paths)
    suffixes = sorted({path.rpartition(".")[2] for path in paths})
    matched = {path for path, _ in model.named_modules() if path and matches(suffixes, path)}
    return suffixes if matched == chosen and not any(name.isdigit() for name in suffixes) else list(paths)
