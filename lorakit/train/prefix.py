"""The frozen lower part of a model: how far it reaches, what it computes, and a forward pass that takes that as given.

Where no adapter touches anything below block k (embeddings included), the hidden states that enter block k are the same in
every epoch. They are computed once for each row (`states_below`); training then runs blocks k to n and the head (`fed`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.alone import by_token
from lorakit.attach.anatomy import blocks
from lorakit.errors import UsageError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prefix:
    """The lower part of one model. It holds while the same adapters are on and the same parameters are trained."""

    blocks: tuple[nn.Module, ...]
    """All blocks, in the order in which they run."""
    depth: int
    """How many of them lie below the first that training touches; at least 1."""
    width: int
    """Channels of a hidden state."""
    dtype: torch.dtype
    """Of the states, as block `depth` takes them."""


def lowest_block_trained(model: nn.Module) -> bool:
    """Whether training touches the lowest block (or there are no blocks to tell): nothing could be kept then."""
    found = blocks(model)
    return found is None or any(one.requires_grad for one in found[1][0].parameters())


def find_prefix(model: nn.Module, inputs: Inputs) -> Prefix:
    """How many blocks are the same at every step, found by one forward pass in training mode over `inputs`.

    inputs: the model's, without labels; one short row suffices. Blocks count as long as no gradient is recorded below
    them (nothing there is trained) and nothing is drawn from the random generators (no dropout).
    Raises UsageError where there are none, and says why. Model, modes and generators are left as they were.
    """
    found = blocks(model)
    if found is None:
        raise UsageError(f"{type(model).__name__} has no single list of blocks that could be split in two.")
    path, stack = found
    if not by_token(model):
        raise UsageError("an adapter puts tokens of its own into each row, so its states are not one a token.")
    if lowest_block_trained(model):
        raise UsageError(f"something in {path}.0, the lowest block, is trained, so nothing stays the same below it.")
    entered = _entries(model, list(stack), inputs)
    depth = max((number for number, entry in enumerate(entered) if entry.same), default=0)
    if depth < 1:
        raise UsageError(_why_not(model, path, entered))
    return Prefix(tuple(stack), depth, entered[depth].width, entered[depth].dtype)


@dataclass(frozen=True)
class _Entry:
    """What a block was given."""

    fixed: bool  # nothing below it is trained
    drawn: bool  # something below it is random
    width: int
    dtype: torch.dtype

    @property
    def same(self) -> bool:
        return self.fixed and not self.drawn


def _entries(model: nn.Module, stack: Sequence[nn.Module], inputs: Inputs) -> list[_Entry]:
    """What each block is given in a training step."""
    found: list[_Entry] = []
    with _generators_kept() as before, _training(model), torch.enable_grad():

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = _hidden(args, kwargs)
            found.append(_Entry(not state.requires_grad, _generators() != before, state.shape[-1], state.dtype))

        hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in stack]
        try:
            model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
    if len(found) != len(stack):
        raise UsageError(f"the blocks of {type(model).__name__} don't run once each, so they cannot be split in two.")
    return found


def _why_not(model: nn.Module, path: str, entered: Sequence[_Entry]) -> str:
    if len(entered) > 1 and entered[1].drawn and entered[1].fixed:
        active = [name for name, one in model.named_modules() if isinstance(one, nn.Dropout) and one.p > 0]
        names = f" ({', '.join(active[:3])}{', ...' if len(active) > 3 else ''})" if active else ""
        return (
            f"the base's own dropout{names} changes the lower blocks' states at every step. Set its probabilities to 0 in "
            "the model's config to have them kept."
        )
    return f"something below {path}.1 is trained, so nothing stays the same below it."


class _ReachedError(Exception):
    """Ends a forward pass at the block whose input was wanted."""


@torch.no_grad()
def states_below(model: nn.Module, prefix: Prefix, inputs: Inputs) -> Tensor:
    """The hidden states that enter block `prefix.depth`: (batch, seq, width). The blocks above do not run."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(_hidden(args, kwargs))
        raise _ReachedError

    hook = prefix.blocks[prefix.depth].register_forward_pre_hook(take, with_kwargs=True)
    try:
        with suppress(_ReachedError):
            model(**inputs)
    finally:
        hook.remove()
    return taken[0]


@contextmanager
def fed(prefix: Prefix, states: Tensor) -> Iterator[None]:
    """Inside the with-statement the lower blocks don't run: `states` (batch, seq, width) enter block `prefix.depth`.

    The model is called as ever, with the inputs that `states` were computed from, so positions and masks are its own.
    """

    def given(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states

    with standing_in(dict.fromkeys(prefix.blocks[: prefix.depth], given)):
        yield


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the with-statement each module runs the given function as its forward; an exception restores them too.

    It stands in the instance's `__dict__`: no class, hook or key of the state dict changes.
    """
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:  # accelerate's
                module.__dict__["forward"] = own


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    state = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(state, Tensor) or state.dim() != 3:
        raise UsageError("the blocks of this model don't hand on one tensor (batch, seq, channels).")
    return state


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode for all modules, and back to each one's own."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _generators() -> list[bytes]:
    """The states of the global random generators."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return [state.numpy().tobytes() for state in states]


@contextmanager
def _generators_kept() -> Iterator[list[bytes]]:
    """The generators' states as they are, to which they return."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield _generators()
