"""What every adaptation method is to the rest of lorakit: a configuration that drafts tensors for a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.attach.operation import Operation
from lorakit.core.delta import join_fixed, spread_parts
from lorakit.errors import UsageError

LEARNT = ("A", "Bt", "magnitude", "bias")  # the fields of a Pair that are trained
HELD = (*LEARNT, "fixed_a", "fixed_bt")  # all that hold a tensor


@dataclass
class Pair:
    """A low-rank pair at one leaf (or raw parameter), and what the variants of LoRA put beside it.

    A, Bt: (r, in) and (r, out); an embedding (vocab, r) and (r, dim); a convolution (r, in / groups, *kernel) and
    (r / groups, out); a stack of E experts (E r, in), expert-major, and (r E, out), expert-minor.
    """

    A: Tensor
    Bt: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    """DoRA's length of each of the weight's outputs, (out,)."""
    bias: Tensor | None = None
    """A bias of B, (out,): `scale * (B A x + bias)`."""
    fixed_a: Tensor | None = None
    """A pair that is subtracted and never trained: an initialisation that takes its start out of the base (PiSSA)."""
    fixed_bt: Tensor | None = None
    """Its other half."""
    parts: tuple[bool, ...] | None = None
    """Which equal parts of a fused projection's output are adapted; A is then (n r, in) and Bt (r, n out / parts)."""
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def factor(self, strength: float) -> Tensor:
        """`scale * strength` as a 0-dim CPU tensor, kept: making one costs more than all else in a switch."""
        if strength not in self._factors:
            self._factors[strength] = torch.tensor(self.scale * strength, dtype=torch.float64, device="cpu")
        return self._factors[strength]

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """(field, tensor) of every tensor of the pair."""
        for name in HELD:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def learnt(self) -> list[Tensor]:
        """The tensors that are trained (and saved)."""
        return [tensor for name, tensor in self.held() if name in LEARNT]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, Bt) of the ordinary pair that computes the same, of rank n r for n parts and 2 r beside a fixed pair."""
        return effective(self.A, self.Bt, self.parts, self.fixed_a, self.fixed_bt)


def effective(
    A: Tensor, Bt: Tensor, parts: tuple[bool, ...] | None, fixed_a: Tensor | None, fixed_bt: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See Pair.factors."""
    if parts is not None:
        Bt = spread_parts(Bt, parts)
    if fixed_a is not None and fixed_bt is not None:
        A, Bt = join_fixed(A, Bt, fixed_a, fixed_bt)
    return A, Bt


@dataclass
class TokenRows:
    """Rows of an embedding that are trained in full. indices: (n,) of whole numbers, ascending; rows: (n, dim)."""

    indices: Tensor
    rows: Tensor


@dataclass
class Insert:
    """A computation that an adapter adds at a module. tensors: what it trains, by name."""

    operation: Operation
    tensors: dict[str, Tensor]


@dataclass
class Draft:
    """What a method adds to a model; nothing of the model has been changed yet.

    pairs: leaf path -> low-rank pair. replaced: module path -> {parameter name: the adapter's own tensor}.
    raw: module path -> {parameter name: pair} for parameters that their module reads itself (experts, attention).
    tokens: embedding path -> rows trained in full.
    tied: path of a head -> path of the embedding whose pair (or rows) it takes too, their weight being one.
    inserts: module path -> {label: what is computed there besides}; the first is innermost.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    replaced: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    raw: dict[str, dict[str, Pair]] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    inserts: dict[str, dict[str, Insert]] = field(default_factory=dict)

    def all_pairs(self) -> Iterator[tuple[str, Pair]]:
        """(path, pair) of every low-rank pair; a raw parameter's path ends in its name."""
        yield from self.pairs.items()
        for path, group in self.raw.items():
            for name, pair in group.items():
                yield f"{path}.{name}", pair

    def low_rank(self) -> list[Tensor]:
        """The trained tensors of all pairs."""
        return [tensor for _, pair in self.all_pairs() for tensor in pair.learnt()]

    def inserted(self) -> list[Tensor]:
        """The trained tensors of all inserts; one that several share once."""
        found = [tensor for group in self.inserts.values() for one in group.values() for tensor in one.tensors.values()]
        return list({id(tensor): tensor for tensor in found}.values())

    def tensors(self) -> list[Tensor]:
        """Every trained tensor, in the model's order."""
        own = [tensor for group in self.replaced.values() for tensor in group.values()]
        found = self.low_rank() + own + [rows.rows for rows in self.tokens.values()] + self.inserted()
        return list({id(tensor): tensor for tensor in found}.values())  # a shared one once

    def move(self, copy: Callable[[Sequence[Tensor]], Sequence[Tensor]], of_pairs: Sequence[str] = HELD) -> None:
        """Put what `copy` gives for each tensor of a list in the places of all; one that several places share stays one.

        of_pairs: the fields of pairs that are meant.
        """
        places = list(self._places(of_pairs))
        own = list({id(tensor): tensor for _, _, tensor in places}.values())
        moved = dict(zip(map(id, own), copy(own), strict=True))
        for holder, key, tensor in places:
            if isinstance(holder, dict):
                holder[key] = moved[id(tensor)]
            else:
                setattr(holder, key, moved[id(tensor)])

    def _places(self, of_pairs: Sequence[str]) -> Iterator[tuple[Any, str, Tensor]]:
        """(what holds it, under which name, tensor): a dictionary's value or an object's field."""
        for _, pair in self.all_pairs():
            yield from ((pair, name, tensor) for name, tensor in pair.held() if name in of_pairs)
        for rows in self.tokens.values():
            yield rows, "rows", rows.rows
        groups = [*self.replaced.values(), *(one.tensors for group in self.inserts.values() for one in group.values())]
        for group in groups:
            yield from ((group, name, tensor) for name, tensor in group.items())

    def paths(self) -> dict[str, None]:
        """The modules that the draft touches, each once."""
        return dict.fromkeys([*self.pairs, *self.raw, *self.tokens, *self.tied, *self.replaced, *self.inserts])


class Method(ABC):
    """An adaptation method: frozen configuration, drafts for any model. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    learning_rate: ClassVar[float] = 2.0e-4
    """The peak learning rate for a base 2,048 wide that a recipe takes where it names none (see lorakit.run.rate)."""

    @abstractmethod
    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        """Fresh tensors for `model`, which stays untouched.

        dtype: of the new tensors; None = that of the weight they stand beside. generator: a CPU generator for the
        initial values; None = torch's global one. Raises TargetError where the model has no place for the method.
        """

    @property
    def members(self) -> "tuple[Method, ...]":
        """The methods that this one joins; of a single one itself."""
        return (self,)

    def learning_rates(self, model: nn.Module, draft: Draft) -> Mapping[int, float]:
        """id of a trained tensor -> the factor on the learning rate that the method gives it; 1 where it stands not."""
        return {}


@dataclass(frozen=True)
class Several(Method):
    """Methods that adapt one model together (LoRA with a prefix: the paper's appendix E); a list of methods becomes this."""

    name: ClassVar[str] = "several"

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        if len(self.methods) < 2 or not all(isinstance(one, Method) for one in self.methods):
            came = ", ".join(one.name if isinstance(one, Method) else repr(one) for one in self.methods)
            raise UsageError(f"a combination is one flat list of at least two methods, not [{came}].")
        if any(isinstance(one, Several) for one in self.methods):
            raise UsageError("a combination holds methods, no other combination: write one flat list.")
        names = [one.name for one in self.methods]
        if len(set(names)) < len(names):
            raise UsageError(f"a combination takes one method of a kind, not {', '.join(names)}.")

    @property
    def members(self) -> tuple[Method, ...]:
        return self.methods

    def drafts(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> list[Draft]:
        """A draft for each method, in order."""
        return [one.draft(model, dtype=dtype, generator=generator) for one in self.methods]

    def draft(self, model: nn.Module, *, dtype: torch.dtype | None, generator: torch.Generator | None) -> Draft:
        return joined(self.drafts(model, dtype=dtype, generator=generator))

    def learning_rates(self, model: nn.Module, draft: Draft) -> Mapping[int, float]:
        return {key: rate for one in self.methods for key, rate in one.learning_rates(model, draft).items()}


def joined(drafts: Sequence[Draft]) -> Draft:
    """One draft of several. A head that more than one trains in full is taken from the first; else each place is one's own."""
    whole = Draft()
    for draft in drafts:
        for one in fields(Draft):
            mine, theirs = getattr(whole, one.name), getattr(draft, one.name)
            for path, value in theirs.items():
                if one.name in ("raw", "inserts", "replaced"):
                    taken = mine.setdefault(path, {})
                    if one.name != "replaced":
                        _check_apart(path, set(taken) & set(value))
                    if one.name == "inserts":
                        _check_order(path, taken, value)
                    taken.update({name: part for name, part in value.items() if name not in taken})
                else:
                    _check_apart(path, {path} & set(mine))
                    mine[path] = value
    return whole


def _check_apart(path: str, both: set[str]) -> None:
    if both:
        raise UsageError(
            f"two methods of the combination adapt {path} ({', '.join(sorted(both))}): leave it to one of them."
        )


def _check_order(path: str, mine: Mapping[str, Insert], theirs: Mapping[str, Insert]) -> None:
    """A prompt, and the infix of a prefix, each count the columns of the sequence that they are given: not the other's."""
    if all(any(not one.operation.by_token for one in group.values()) for group in (mine, theirs)):
        raise UsageError(
            f"two methods of the combination add to the sequence at {path or 'the model'} ({', '.join([*mine, *theirs])}), and "
            "which of them counts the other's tokens is not defined. Leave one out, or the infix of prefix tuning."
        )
