"""What a prefix or a prompt needs to know of a model: its backbone, which way attention looks, how far positions go."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.anatomy import walk
from lorakit.attach.api import use
from lorakit.attach.host import find_host
from lorakit.errors import TargetError, UsageError

POSITIONS = ("wpe", "position_embeddings", "embed_positions")  # what transformers calls a table of positions
CACHES = ("cache", "past_key_values")
"""What a forward of transformers calls the key/value cache: the first from 5.24 on, the second before."""
MOST = 2**31 - 1
"""The longest side of a tensor that a method asks for."""


def backbone(model: nn.Module, what: str) -> tuple[str, Any]:
    """(path, module) of the part of a transformers model that takes inputs_embeds and gives hidden states.

    what: the method's name, for the TargetError where there is none.
    """
    prefix = getattr(model, "base_model_prefix", None)
    config = getattr(model, "config", None)
    if prefix is None or config is None:
        raise TargetError(f"{what} is for transformers' text models, and {type(model).__name__} is none.")
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            f"{what} is for decoders and encoders, and {type(model).__name__} is both: which of the two would get it is not "
            "defined. Use lorakit.LoRA there."
        )
    path = prefix if prefix in model._modules else ""
    inner = model.get_submodule(path)._modules.get("decoder")
    if inner is not None and "inputs_embeds" in parameters_of(plain(type(inner))):  # OPT's head calls this one itself
        path = f"{path}.decoder" if path else "decoder"
    body = model.get_submodule(path)
    if "inputs_embeds" not in parameters_of(plain(type(body))):
        raise TargetError(f"{what}: {path or 'the model'} ({type(body).__name__}) takes no inputs_embeds.")
    return path, body


@cache
def parameters_of(cls: Any) -> tuple[str, ...]:
    """The names of what a module's forward takes, self left out."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def named(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; a cache under the name that the module's forward has, whichever the caller used."""
    given = {**dict(zip(parameters_of(plain(type(module))), args, strict=False)), **kwargs}
    if (name := cache_name(module)) is not None:
        for other in CACHES:
            if other != name and other in given:
                given[name] = given.pop(other)
    return given


def cache_name(module: nn.Module) -> str | None:
    """What the module's forward calls the key/value cache; None where it takes none."""
    taken = parameters_of(plain(type(module)))
    return next((name for name in CACHES if name in taken), None)


def cache_given(module: nn.Module, given: Mapping[str, Any]) -> Any:
    """The key/value cache among a call's arguments, or None."""
    name = cache_name(module)
    return None if name is None else given.get(name)


def cache_of(output: Any) -> Any:
    """The key/value cache in what a model gave back."""
    return next(output[name] for name in CACHES if output.get(name) is not None)


def is_causal(body: nn.Module) -> bool:
    """Whether tokens see only what stands before them: as attention says, or, where none says, whether there is a cache."""
    said = [flag for _, module in walk(body) if isinstance(flag := getattr(module, "is_causal", None), bool)]
    return any(said) if said else cache_name(body) is not None


def embedding_of(body: Any) -> Any:
    """The table that input ids go through. Raises TargetError where there is none."""
    found = body.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise TargetError(
            f"{type(body).__name__} has no table of input embeddings, so no virtual token has a place in it."
        )
    return found


def origin(body: nn.Module) -> int | None:
    """The number before RoBERTa's first position, at which padding stands; None where positions count from 0."""
    for path, module in walk(body):
        if path.rpartition(".")[2] in POSITIONS and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx
    return None


def limit(model: Any) -> int | None:
    """The most positions that the model takes; None where it says none."""
    for path, module in walk(model):
        if path.rpartition(".")[2] in POSITIONS and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most


def check_room(model: nn.Module, length: int, what: str) -> None:
    """Raise UsageError where `length` virtual tokens leave no position to a real one."""
    most = limit(model)
    if most is not None and length >= most:
        raise UsageError(
            f"{what} of {length} virtual tokens leaves no place in the {most} positions of {type(model).__name__}. Take fewer."
        )


def check_length(name: str, value: Any, least: int = 1) -> None:
    """Raise UsageError unless `value` is a whole number of at least `least`, and one that a tensor's side can have."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    if value > MOST:  # from a file: shapes of such sides overflow before they can be compared
        raise UsageError(f"{name} must be a whole number from {least} to {MOST}, and a larger one came.")


def check_ids(name: str, ids: Any) -> None:
    """Raise UsageError unless `ids` is a list of token ids, or None."""
    listed = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
    if ids is not None and not (listed and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)):
        raise UsageError(f"{name} must be a list of token ids such as [5, 17], not {ids!r}.")


def fresh(
    shape: Sequence[int],
    like: Tensor,
    *,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
    std: float | None = None,
    bound: float = 0.0,
) -> Tensor:
    """A tensor from N(0, std), or else from the even distribution on [-bound, bound], beside `like`."""
    dtype = dtype or like.dtype
    if like.is_meta:
        return torch.empty(*shape, dtype=dtype, device="meta")
    drawn = torch.empty(*shape)
    if std is not None:
        drawn.normal_(0.0, std, generator=generator)
    else:
        drawn.uniform_(-bound, bound, generator=generator)
    return drawn.to(like.device, dtype)


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Without the adapters that are on: what a fresh adapter starts from is the base's."""
    if find_host(model) is None:
        yield
        return
    with use(model, None):
        yield


def rows_of(body: Any, ids: Sequence[int], count: int, dtype: torch.dtype | None) -> Tensor:
    """`count` rows of the input embeddings: those of the tokens, from the first again where they are fewer."""
    table = embedding_of(body)
    wrong = [
        one for one in ids if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < table.num_embeddings
    ]
    if wrong or not ids:
        raise UsageError(
            f"tokens must be ids of the model's vocabulary, 0 to {table.num_embeddings - 1}, at least one; came {list(ids)!r}."
        )
    index = torch.tensor([ids[at % len(ids)] for at in range(count)], device=table.weight.device)
    with torch.no_grad():
        return _bare(table)(index).to(dtype or table.weight.dtype).clone()  # some scale their rows


def _bare(leaf: Any) -> Any:
    """The layer as it is without adapters, on the same tensors."""
    cls = plain(type(leaf))
    if cls is type(leaf):
        return leaf
    twin = cls.__new__(cls)
    twin.__dict__.update({key: value for key, value in leaf.__dict__.items() if key != "_lk_site"})
    return twin
