"""attach, detach, use, route, adapters, parameters, count_parameters: the verbs on a model in memory."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.attach.alone import check_together
from lorakit.attach.anatomy import parameters_of
from lorakit.attach.host import KEY, Host, Record, State, check_names, check_not_merged, find_host, host_of
from lorakit.attach.method import LEARNT, Draft, Method, Several
from lorakit.attach.quantized import dense_shape
from lorakit.core.route import Route
from lorakit.errors import AdapterError, UsageError

Names = str | Mapping[str, float] | None


@dataclass(frozen=True)
class AttachReport:
    """What attach did. trainable, total: numbers of parameters, of the adapter and of the model with it."""

    name: str
    modules: tuple[str, ...]
    trainable: int
    total: int


@dataclass(frozen=True)
class AdapterInfo:
    """One attached adapter. parameters: how many numbers it holds; strength: 0.0 where it is off."""

    name: str
    method: Method
    active: bool
    strength: float
    trainable: bool
    parameters: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. total: all that the model computes with, shared ones once; trainable: those with gradients.

    low_rank: of the active adapters' low-rank pairs; replaced: of the heads and biases that they train in full (the
    paper trains a classification head but does not count it: its figures are `low_rank` or `inserted`); inserted: of what
    they compute besides the model's own layers (bottleneck adapters, prefixes).
    """

    trainable: int
    total: int
    low_rank: int
    replaced: int
    inserted: int


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    name: str = "default",
    *,
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> AttachReport:
    """Attach a fresh adapter, in place, freeze the base and switch the adapter on (it changes no output yet, unless it is a
    prompt or a prefix). A list of methods adapts together, as one adapter.

    dtype: of the low-rank tensors; None = that of the weight beside each. seed: of its initial values; None = torch's
    global generator. Raises TargetError where nothing (or the wrong thing) matches, AdapterError where the name is taken
    or an adapter is merged; the model is then as it was.
    """
    if isinstance(method, list | tuple):
        method = Several(tuple(method)) if len(method) != 1 else method[0]
    if not isinstance(method, Method):
        came = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise UsageError(f"attach expects a method such as lorakit.LoRA(r=8), not {came}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a floating-point torch.dtype, not {dtype!r}.")
    host = find_host(model)
    check_can_add(host, name)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    draft = method.draft(model, dtype=dtype, generator=generator)
    return add(model, Record(name, method, draft, trainable))


def check_can_add(host: Host | None, name: str) -> None:
    """Raise AdapterError where an adapter called `name` could not be added."""
    if not name or not isinstance(name, str):
        raise UsageError(f"an adapter's name is a non-empty string, not {name!r}.")
    if host is not None:
        check_not_merged(host)
        if name in host.records:
            raise AdapterError(f"an adapter {name!r} is attached already. Choose another name, or detach it first.")


def add(model: nn.Module, record: Record) -> AttachReport:
    """Add a drafted (or loaded) adapter to the model and switch it on."""
    host = find_host(model)
    check_can_add(host, record.name)
    own = {f"{path}.{key}" if path else key: parameter for path, key, parameter in parameters_of(model)}
    if host is None:
        host = Host({full: parameter.requires_grad for full, parameter in own.items()})
    base = [own[full] for full in host.flags if full in own]
    with host.lock:
        set_trainable(record.draft, record.trainable)
        before = host.state
        host.records[record.name] = record
        try:
            host.dress(model, record)
            host.switch(State(((record.name, 1.0),)))
        except BaseException:
            _forget(model, host, record.name, before)
            raise
        model.__dict__[KEY] = host
        for parameter in base:
            parameter.requires_grad_(False)
        paths, size = record.paths(), _size(record.tensors())
        modules = tuple(path for path in host.leaves if path in paths)
        total = sum(dense_shape(parameter).numel() for parameter in base) + size
        return AttachReport(record.name, modules, size if record.trainable else 0, total)


def _forget(model: nn.Module, host: Host, name: str, before: State) -> None:
    host.switch(before)
    del host.records[name]
    host.undress(keep=host.needed())
    host.dress(model)


def set_trainable(draft: Draft, trainable: bool) -> None:
    """Make every tensor of a draft a parameter (trainable) or a plain tensor (frozen), sharing its memory."""
    made = nn.Parameter if trainable else Tensor.detach
    draft.move(lambda own: [made(tensor.detach()) for tensor in own], LEARNT)


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter off for good. With the last one the model is, bit for bit and class for class, as before attach.

    The others that are on stay on; a route that it is part of ends, and the base is on.
    """
    host = host_of(model)
    with host.lock:
        check_not_merged(host)
        check_names(host, {name: 1.0})
        host.check_undressable()
        host.switch(_without(host.state, {name}))
        del host.records[name]
        host.undress(keep=host.needed())
        if host.records:
            host.dress(model)
            return
        del model.__dict__[KEY]
        for path, key, parameter in parameters_of(model):
            parameter.requires_grad_(host.flags.get(f"{path}.{key}" if path else key, parameter.requires_grad))


def _without(state: State, gone: Collection[str]) -> State:
    rest = tuple(entry for entry in state.selection if entry[0] not in gone)
    if len(rest) == len(state.selection):
        return state
    return State(rest) if state.route is None else State()


class Restore:
    """What `use` and `route` return: in a with-statement, leaving it switches back to what was on before (less what was
    detached within it)."""

    def __init__(self, host: Host, before: State) -> None:
        self._host, self._before = host, before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._host.lock:
            check_not_merged(self._host)
            gone = {name for name, _ in self._before.selection} - set(self._host.records)
            self._host.switch(_without(self._before, gone))


def selection_of(names: Names) -> dict[str, float]:
    """{adapter: strength} from what `use` takes: a name, a mapping, or None for the base."""
    if names is None:
        return {}
    if isinstance(names, str):
        return {names: 1.0}
    if not isinstance(names, Mapping):
        raise UsageError(
            f"expected an adapter's name, a mapping of names to strengths, or None, not {type(names).__name__}."
        )
    for name, strength in names.items():
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise UsageError(f"the strength of {name!r} must be a finite number, not {strength!r}.")
    return {name: float(strength) for name, strength in names.items()}


def use(model: nn.Module, names: Names) -> Restore:
    """Switch to one adapter, to several ({"sql": 0.7, "fr": 0.5} adds their weighed updates), or to the base (None).

    A head or bias that an adapter replaces is weighed the same way, base + strength * (own - base).
    """
    host = host_of(model)
    with host.lock:
        check_not_merged(host)
        chosen = selection_of(names)
        check_names(host, chosen)
        check_together(host, chosen, routed=False)
        before = host.state
        host.switch(State(tuple(chosen.items())))
        return Restore(host, before)


def route(
    model: nn.Module, rows: Sequence[str | None], *, per: Literal["row", "token"] = "row", strict: bool = False
) -> Restore:
    """Give each row of the next batches an adapter of its own (None = the base).

    rows: one name a row of the batch; with per="token" one a token, for inputs that pack rows as (1, tokens). Where a
    layer receives rows multiplied (beams, a flattened input) each name stands for as many neighbours. strict:
    compute each row's low-rank part on its own, so that it has the very bits that it has alone.
    """
    host = host_of(model)
    if per not in ("row", "token"):
        raise UsageError(f"per must be 'row' or 'token', not {per!r}.")
    if isinstance(rows, str) or not rows:
        raise UsageError("route expects a list with one adapter name (or None) for each row.")
    with host.lock:
        check_not_merged(host)
        names = list(dict.fromkeys(name for name in rows if name is not None))
        check_names(host, dict.fromkeys(names, 1.0))
        check_together(host, names, routed=True)
        index = tuple(-1 if name is None else names.index(name) for name in rows)
        before = host.state
        host.switch(State(tuple((name, 1.0) for name in names), Route(index, strict=strict, tokens=per == "token")))
        return Restore(host, before)


def adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The attached adapters by name, in the order in which they came; {} where none is attached."""
    host = find_host(model)
    if host is None:
        return {}
    strengths: dict[str, float] = dict(host.merged.before.selection if host.merged else host.state.selection)
    return {
        name: AdapterInfo(
            name,
            record.method,
            name in strengths,
            strengths.get(name, 0.0),
            record.trainable,
            _size(record.tensors()),
            tuple(record.paths()),
        )
        for name, record in host.records.items()
    }


def parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of a trainable adapter, on or off: what an optimizer takes."""
    host = host_of(model)
    with host.lock:
        check_names(host, {name: 1.0})
        host.current()
        record = host.records[name]
        if not record.trainable:
            raise AdapterError(f"adapter {name!r} is frozen. Attach or load it with trainable=True to train it.")
        return [tensor for tensor in record.tensors() if isinstance(tensor, nn.Parameter)]


def learning_rates(model: nn.Module, name: str) -> dict[int, float]:
    """id of a trainable tensor of adapter `name` -> the factor on its learning rate, where the method wants one (LoRA+)."""
    parameters(model, name)
    record = host_of(model).records[name]
    return dict(record.method.learning_rates(model, record.draft))


def count_parameters(model: nn.Module) -> Counts:
    """Count the model's parameters with its active adapters; works on the meta device. See Counts."""
    host = find_host(model)
    adapter_ids: set[int] = set()
    low_rank = replaced = inserted = 0
    if host is not None:
        host.current()
        active = [host.records[name] for name, _ in host.state.selection]
        adapter_ids = {id(tensor) for record in active for tensor in record.tensors()}
        low_rank = _size([tensor for record in active for tensor in record.draft.low_rank()])
        inserted = _size([tensor for record in active for tensor in record.draft.inserted()])
        replaced = _size([tensor for record in active for tensor in record.tensors()]) - low_rank - inserted
    own = [parameter for parameter in model.parameters() if id(parameter) not in adapter_ids]
    total = sum(dense_shape(parameter).numel() for parameter in own) + low_rank + replaced + inserted
    return Counts(
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        total=total,
        low_rank=low_rank,
        replaced=replaced,
        inserted=inserted,
    )


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
