"""Fresh tensors of an adapter: the pair of each leaf and raw parameter with its initial values, token rows, ties."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import shared_with
from lorakit.attach.kinds import EmbeddingKind, LeafKind, LinearKind, low_rank_kind
from lorakit.attach.method import Draft, Pair, TokenRows
from lorakit.attach.quantized import dense_dtype, is_quantized
from lorakit.attach.targets import find_modules
from lorakit.errors import TargetError, UsageError
from lorakit.methods.pissa import FromBase

if TYPE_CHECKING:
    from lorakit.methods.lora import LoRA

TokenIndices = Sequence[int] | Mapping[str, Sequence[int]] | None


class Starter:
    """Makes pairs for one configuration. dtype: of the new tensors; None = that of the weight beside each."""

    def __init__(self, dtype: torch.dtype | None, generator: torch.Generator | None, method: "LoRA") -> None:
        self.dtype, self.generator, self.method = dtype, generator, method
        self.variants = method.variants()
        self.kinds: dict[type, LeafKind | None] = {}
        self.wide: dict[str, tuple[int, int]] = {}

    def leaf(self, path: str, leaf: nn.Module) -> Pair:
        """The pair of a layer. Raises TargetError, UsageError where it takes none of this configuration."""
        cls = plain(type(leaf))
        if cls not in self.kinds:
            self.kinds[cls] = low_rank_kind(cls)
        kind, weight = self.kinds[cls], leaf._parameters["weight"]
        if kind is None or weight is None:
            raise TargetError(f"{path} ({cls.__name__}) takes no low-rank update.")
        method = self.method
        pair = self._plain(path, leaf, kind, weight)
        if method.lora_bias:
            if isinstance(kind, EmbeddingKind):
                raise UsageError(f"{path} is an embedding, whose update has no bias: leave it out, or lora_bias.")
            pair.bias = pair.Bt.new_zeros(kind.shape(leaf)[1])
        for variant in self.variants:
            variant.check(path, leaf, kind, pair)
            pair = variant.start(path, leaf, kind, pair)
        return pair

    def fix(self, path: str, leaf: nn.Module, kind: LeafKind, pair: Pair) -> None:
        """Give a pair that was loaded, and that started as a part of the base (PiSSA), the fixed pair that goes with it.

        Raises UsageError where the layer does not take the file's variant.
        """
        for variant in self.variants:
            variant.check(path, leaf, kind, pair)
            if isinstance(variant, FromBase):
                fresh = Pair(pair.A, pair.Bt, pair.scale)
                variant.start(path, leaf, kind, fresh)
                pair.fixed_a, pair.fixed_bt = fresh.fixed_a, fresh.fixed_bt

    def _plain(self, path: str, leaf: nn.Module, kind: LeafKind, weight: Tensor) -> Pair:
        r, parts = self.method.rank(path), self.method.parts(path)
        a_shape, b_shape = kind.factor_shapes(leaf, r)
        if parts is not None:
            a_shape, b_shape = _part_shapes(path, kind, a_shape, b_shape, parts)
        if r > min(math.prod(a_shape[1:]) if kind.zero == "B" else a_shape[0], b_shape[1]):
            self.wide[path] = kind.shape(leaf)
        like = self._like(weight)
        scale, dropout = self.method.scaling(path), self.method.dropout
        if kind.zero == "A":  # an embedding, as loralib: At (vocab, r) zero, Bt (r, dim) from N(0, 1)
            at = torch.zeros(a_shape, dtype=like, device=weight.device)
            return Pair(at, self._random(b_shape, "normal", like, weight.device, r), scale, dropout)
        a = self._random(a_shape, self.method.init, like, weight.device, r)
        return Pair(a, torch.zeros(b_shape, dtype=like, device=weight.device), scale, dropout, parts=parts)

    def raw(self, path: str, module: nn.Module, name: str) -> Pair:
        """The pair of a raw parameter, (out, in) or a stack of experts' (see lorakit.core.delta.expert_delta)."""
        parameter: Tensor = module._parameters[name]  # type: ignore[assignment]
        full, method = f"{path}.{name}", self.method
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point() or is_quantized(parameter):
            raise TargetError(
                f"{full} {list(parameter.shape)} ({parameter.dtype}) takes no low-rank update: expected a matrix or a stack of "
                "matrices of floating-point numbers."
            )
        odd = [key for key in ("dropout", "lora_bias", "use_dora") if getattr(method, key)]
        odd += ["init"] if method.init not in ("kaiming", "gaussian") else []
        if odd:
            raise UsageError(
                f"{full} is read by its module as a whole, and no {' or '.join(odd)} can act on its product with an input. "
                "Leave that out, or the parameter."
            )
        experts, d_in, d_out = raw_shape(module, parameter)
        r, like = method.rank(path), self._like(parameter)
        a = self._random((experts * r, d_in), method.init, like, parameter.device, r)
        return Pair(a, torch.zeros(r * experts, d_out, dtype=like, device=parameter.device), method.scaling(path))

    def attention(self, draft: Draft, path: str, module: nn.Module) -> None:
        """PyTorch's attention layer: a pair on its fused input projection and one on its output projection, as PEFT."""
        if module._parameters.get("in_proj_weight") is None:
            raise TargetError(f"{path} has unlike widths of query, key and value, which takes no low-rank update.")
        draft.raw[path] = {"in_proj_weight": self.raw(path, module, "in_proj_weight")}
        out = f"{path}.out_proj"
        draft.raw[out] = {"weight": self.raw(out, module.get_submodule("out_proj"), "weight")}

    def warn(self) -> None:
        """Say which ranks are larger than their matrices."""
        if self.wide:
            path, shape = next(iter(self.wide.items()))
            warnings.warn(
                f"the rank is larger than the smaller side of {len(self.wide)} adapted matrices (first {path}: {shape[0]} x "
                f"{shape[1]}): the matrix itself bounds the update's rank, so a smaller r gives the same with fewer parameters.",
                UserWarning,
                stacklevel=5,
            )

    def _like(self, weight: Tensor) -> torch.dtype:
        return self.dtype or dense_dtype(weight)

    def _random(self, shape: tuple[int, ...], how: str, dtype: torch.dtype, device: torch.device, r: int) -> Tensor:
        """Initial values, drawn in float32 on the CPU so that a seed gives the same on every device and in every dtype."""
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        if how == "normal":
            nn.init.normal_(values, generator=self.generator)
        elif how == "gaussian":
            nn.init.normal_(values, std=1.0 / r, generator=self.generator)
        else:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=self.generator)
        return values.to(device=device, dtype=dtype)


def raw_shape(module: nn.Module, parameter: Tensor) -> tuple[int, int, int]:
    """(experts, in, out) of a raw parameter: (out, in), (E, out, in), or (E, in, out) where the module is_transposed."""
    if parameter.dim() == 2:
        return 1, parameter.shape[1], parameter.shape[0]
    experts, first, second = parameter.shape
    return (experts, first, second) if getattr(module, "is_transposed", False) else (experts, second, first)


def _part_shapes(
    path: str, kind: LeafKind, a_shape: tuple[int, ...], b_shape: tuple[int, int], parts: tuple[bool, ...]
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The shapes of a fused projection's pair: A (n r, in), Bt (r, n out / parts)."""
    if not isinstance(kind, LinearKind) or not any(parts) or b_shape[1] % len(parts):
        raise TargetError(
            f"{path}: enable_lora={list(parts)} expects a linear layer whose {b_shape[1]} outputs are {len(parts)} equal parts, "
            "with at least one of them adapted."
        )
    count = sum(parts)
    return (count * a_shape[0], *a_shape[1:]), (b_shape[0], count * (b_shape[1] // len(parts)))


def add_token_rows(draft: Draft, model: nn.Module, asked: TokenIndices, dtype: torch.dtype | None) -> None:
    """Rows of embeddings that are trained in full, and the heads that share the embedding's weight."""
    if asked is None:
        return
    groups = asked if isinstance(asked, Mapping) else {_input_embeddings(model): asked}
    for name, indices in groups.items():
        for path in find_modules(model, [name], "trainable_token_indices"):
            leaf = model.get_submodule(path)
            weight = leaf._parameters.get("weight")
            if not isinstance(low_rank_kind(plain(type(leaf))), EmbeddingKind) or weight is None:
                raise TargetError(
                    f"trainable_token_indices names {path}, a {type(leaf).__name__}: expected an embedding."
                )
            if path in draft.replaced and "weight" in draft.replaced[path]:
                raise UsageError(f"{path} is trained in full (modules_to_save): its rows are trained with it.")
            if path in draft.pairs:
                raise UsageError(
                    f"{path} takes a low-rank update (target_modules), which its rows in trainable_token_indices would replace. "
                    "Leave it out of one of the two."
                )
            draft.tokens[path] = _rows(path, indices, weight, dtype)
    tie_rows(draft, model)


def _rows(path: str, indices: Sequence[int], weight: Tensor, dtype: torch.dtype | None) -> TokenRows:
    wrong = [index for index in indices if isinstance(index, bool) or not 0 <= index < weight.shape[0]]
    if wrong or not len(indices):
        raise UsageError(
            f"{path} has rows 0 to {weight.shape[0] - 1}; trainable_token_indices names {wrong or 'none'}."
        )
    where = torch.tensor(sorted(set(indices)), device=weight.device)
    return TokenRows(where, weight.detach()[where].to(dtype or weight.dtype))


def rows_at(indices: Sequence[int], rows: Tensor) -> TokenRows:
    """Rows as a file has them, in the order of `indices`, in ascending order; of a row that it has twice, the last."""
    place = {index: i for i, index in enumerate(indices)}
    order = sorted(place)
    return TokenRows(torch.tensor(order), rows[[place[index] for index in order]].contiguous())


def tie_rows(draft: Draft, model: nn.Module) -> None:
    """Have the heads, and other embeddings, that share an embedding's weight take its rows too.

    Where several that share one weight were named, each has rows of its own, and the rest stays as it is (as in PEFT).
    """
    for path in draft.tokens:
        sharers = _sharers(model, path)
        if draft.tokens.keys().isdisjoint(sharers):
            draft.tied.update(dict.fromkeys(sharers, path))


def _input_embeddings(model: nn.Module) -> str:
    get = getattr(model, "get_input_embeddings", None)
    found = get() if callable(get) else None
    path = next((path for path, module in model.named_modules() if found is not None and module is found), None)
    if path is None:
        raise TargetError(
            f"{type(model).__name__} does not say which layer its input embeddings are. Name it: "
            "trainable_token_indices={'embed': [...]}."
        )
    return path


def _sharers(model: nn.Module, path: str) -> list[str]:
    """The heads, and the embeddings of other parts (T5's decoder), that use the weight of the embedding at `path` as theirs."""
    found: dict[nn.Module, str] = {}
    for name in shared_with(model, path, "weight"):
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        if parameter == "weight" and isinstance(low_rank_kind(plain(type(module))), LinearKind | EmbeddingKind):
            found.setdefault(module, owner)
    found.pop(model.get_submodule(path), None)
    return list(found.values())


def tie(draft: Draft, model: nn.Module) -> None:
    """Have each head that shares an adapted embedding's weight take the embedding's pair, and its replaced weight, too."""
    for path in [*draft.pairs]:
        if path in draft.pairs and isinstance(low_rank_kind(plain(type(model.get_submodule(path)))), EmbeddingKind):
            heads = _sharers(model, path)
            if heads and draft.pairs[path].magnitude is not None:
                raise UsageError(
                    f"{path} shares its weight with {heads[0]} (ensure_weight_tying), and DoRA's lengths are of the embedding's "
                    "outputs, not of the head's. Leave out use_dora, ensure_weight_tying or the embedding."
                )
            for head in heads:
                draft.pairs.pop(head, None)
                draft.tied[head] = path
    for path, group in list(draft.replaced.items()):
        for name, tensor in list(group.items()):
            for other in shared_with(model, path, name):
                owner, _, parameter = other.rpartition(".")
                draft.replaced.setdefault(owner, {})[parameter] = tensor
