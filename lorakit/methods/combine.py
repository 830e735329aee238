"""Several attached adapters as a new one: `lorakit.combine`.

The names of the ways are PEFT's (add_weighted_adapter). Unlike there, an adapter's scaling (alpha / r, or rsLoRA's) goes with
its factors, ranks may differ, an adapter need not cover every layer, and one adapter with weight 1 gives itself.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.attach.adapted import plain
from lorakit.attach.api import AttachReport, add, check_can_add, selection_of
from lorakit.attach.host import Host, Record, check_names, host_of
from lorakit.attach.kinds import is_attention
from lorakit.attach.method import Draft, Pair
from lorakit.errors import AdapterError, UsageError
from lorakit.methods.combine_config import Place, configured
from lorakit.methods.combine_layout import Layout, leaf_layout, raw_layout
from lorakit.methods.combine_maths import (
    Result,
    Rule,
    Update,
    concatenated,
    on_factors,
    on_updates,
    truncated_sum,
    widest,
)
from lorakit.methods.combine_whole import Part, weigh_whole
from lorakit.methods.lora import LoRA

RULES = {  # how -> (pruned by, sign elected)
    "linear": ("", False),
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
EXACT = ("cat", "svd")
HOWS = (*EXACT, *RULES, *(f"{how}_svd" for how in RULES if how != "linear"))
SIGNS = ("total", "frequency")
SUMS = ("cat", "svd", "linear")  # the ways in which a bias of B is a weighted sum too


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    how: str = "cat",
    r: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int | None = None,
    trainable: bool = False,
) -> AttachReport:
    """Combine attached adapters of `model` into a new one called `name`, attach it and switch it on.

    weights: {adapter: weight}, negative ones too. how:

    - "cat": the weighted sum of the updates itself; the rank is the sum of the ranks.
    - "svd": the best approximation of rank r of that sum; r is by default the largest of the ranks.
    - "linear": the weighted sum of the A's and of the B's, each weight's root on both: small, and a rough approximation.
    - "magnitude_prune", "ties" (Yadav et al. 2023, arXiv 2306.01708), "dare_linear", "dare_ties" (Yu et al. 2023, arXiv
      2311.03099): on the A's and on the B's, as PEFT does. Smaller ranks get directions of zeros, which take no vote.
    - the same with "_svd": on the updates themselves, as the papers mean it, a layer at a time; then the best
      approximation of rank r. That forms each layer's full update.

    density: the share of entries that is kept, in (0, 1]; for all but cat, svd, linear, which take none. majority_sign:
    how ties and dare_ties choose a sign, by "total" or by "frequency". seed: of dare's draws, made on the CPU; None = torch's
    global generator. Where a layer cannot have rank r, its rank is the largest that it can have.

    Whatever `how`: heads, biases and token rows that adapters train in full are weighed as in lorakit.use, `base + sum of
    weight * (own - base)`. An adapter without an update of a layer adds nothing there. The result has no dropout, the widest
    dtype of each layer's adapters, and is computed in float32 (float64 for float64) and rounded once; lorakit.save writes it.

    Raises UsageError for arguments that make no sense, AdapterError for unknown or taken names, while an adapter is merged,
    and for adapters whose combination is none (DoRA, whose update is not linear in its pair, among them). The
    model is then as it was.
    """
    plan = _plan(how, r, density, majority_sign, seed)
    host = host_of(model)
    with host.lock, torch.inference_mode(False), torch.no_grad():
        check_can_add(host, name)
        parts = _parts(host, weights, how)
        jobs = list(_jobs(model, parts))
        plan.check_rank(jobs)
        draft = Draft()
        places = _harmonised(model, [(job, plan.result(job)) for job in jobs])
        weigh_whole(model, parts, draft)
        method = configured(model, places, parts, draft)
        for place in places:
            _put(draft, place, method)
        return add(model, Record(name, method, draft, trainable))


@dataclass(frozen=True)
class _Job:
    """One layer (or raw parameter, where `name` is not empty) and the updates that adapters have for it."""

    path: str
    name: str
    layout: Layout
    updates: list[Update]
    dtype: torch.dtype
    bias: Tensor | None

    def ranks(self) -> list[int]:
        return [update.a.shape[1] for update in self.updates]

    def bound(self) -> int:
        """The largest rank of a block that means anything."""
        return min(self.updates[0].a.shape[2], self.updates[0].b.shape[2])


@dataclass(frozen=True)
class _Plan:
    """How layers are combined, checked. rule: None for cat and svd."""

    how: str
    rule: Rule | None
    r: int | None

    def check_rank(self, jobs: Iterable[_Job]) -> None:
        if self.r is None:
            return
        largest = 0
        for job in jobs:
            if self.r % job.layout.groups:
                raise UsageError(
                    f"{job.path} is a convolution of {job.layout.groups} groups: r must be a multiple of that, not {self.r}."
                )
            largest = max(largest, self._bound(job) * job.layout.groups)
        if largest and self.r > largest:
            why = "is the sum of the ranks" if self.rule is None else "is the smaller side of the largest layer"
            raise UsageError(
                f"r={self.r} is more than any layer's combination can have: {largest} {why}, at most. Choose a smaller r."
            )

    def result(self, job: _Job) -> Result:
        if self.how == "cat":
            return concatenated(job.updates)
        if self.rule is not None and not self.how.endswith("svd"):
            return on_factors(job.updates, self.rule)
        rank = min(max(job.ranks()) if self.r is None else self.r // job.layout.groups, self._bound(job))
        try:
            return truncated_sum(job.updates, rank) if self.rule is None else on_updates(job.updates, self.rule, rank)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # of infinite numbers
            raise _too_large(job) from error

    def _bound(self, job: _Job) -> int:
        return min(job.bound(), sum(job.ranks())) if self.rule is None else job.bound()


def _plan(how: str, r: int | None, density: float | None, majority_sign: str, seed: int | None) -> _Plan:
    """Checks every argument that is not about the model. An argument that would do nothing is an error."""
    if how not in HOWS:
        near = difflib.get_close_matches(str(how), HOWS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"how must be one of {', '.join(HOWS)}, not {how!r}.{hint}")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise UsageError(f"r must be a whole number of at least 1, not {r!r}.")
    if r is not None and not how.endswith("svd"):
        raise UsageError(f"how={how!r} has the rank that it has: r goes with svd and the ways that end in _svd.")
    if majority_sign not in SIGNS:
        raise UsageError(f"majority_sign must be one of {', '.join(SIGNS)}, not {majority_sign!r}.")
    prune, elect = RULES.get(how.removesuffix("_svd"), ("", False))
    if majority_sign != "total" and not elect:
        raise UsageError(f"how={how!r} elects no sign: majority_sign goes with ties and dare_ties.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise UsageError(f"seed must be a whole number, not {seed!r}.")
    if seed is not None and prune != "random":
        raise UsageError(f"how={how!r} draws nothing: seed goes with the ways that begin with dare.")
    if prune and density is None:
        raise UsageError(f"how={how!r} needs density, the share of entries to keep (0.5, say).")
    if density is not None and not prune:
        raise UsageError(f"how={how!r} prunes nothing: density goes with ties, dare and magnitude_prune.")
    if density is not None and (isinstance(density, bool) or not isinstance(density, int | float)):
        raise UsageError(f"density must be a number in (0, 1], not {density!r}.")
    if density is not None and not 0.0 < density <= 1.0:
        raise UsageError(f"density must be in (0, 1], not {density!r}.")
    if how in EXACT:
        return _Plan(how, None, r)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return _Plan(how, Rule(prune, majority_sign if elect else "", density or 1.0, generator), r)


def _parts(host: Host, weights: Mapping[str, float], how: str) -> list[Part]:
    """The adapters with their weights, all of which can be combined so."""
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(
            f"weights is a mapping of adapters' names to weights ({{'sql': 0.7, 'fr': 0.3}}), not {weights!r}."
        )
    chosen = selection_of(weights)
    check_names(host, chosen)
    host.current()
    parts = []
    for name, weight in chosen.items():
        record = host.records[name]
        if not isinstance(record.method, LoRA):
            raise UsageError(
                f"adapter {name!r} is a {type(record.method).__name__}; only LoRA's adapters can be combined."
            )
        for path, pair in record.draft.all_pairs():
            _check_pair(name, path, pair, how)
        if any(tensor.is_meta for tensor in record.tensors()):
            raise UsageError(f"adapter {name!r} is on the meta device, where tensors have no values to combine.")
        faulty = next((path for path, pair in record.draft.all_pairs() if not _finite(pair)), None)
        if faulty is not None:
            raise AdapterError(f"adapter {name!r} has infinite values or NaN at {faulty}: it cannot be combined.")
        parts.append(Part(record, record.method, weight))
    return parts


def _check_pair(name: str, path: str, pair: Pair, how: str) -> None:
    if pair.magnitude is not None:
        raise AdapterError(
            f"adapter {name!r} has DoRA magnitudes at {path}: its update is not linear in its pair, so no combination of pairs "
            "gives the combination of updates. Use lorakit.use(model, {...}) to have several at once."
        )
    if pair.bias is not None and how not in SUMS:
        raise AdapterError(f"adapter {name!r} has a lora_bias at {path}: combine it by {', '.join(SUMS)}, not {how!r}.")


def _finite(pair: Pair) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in pair.learnt())


def _jobs(model: nn.Module, parts: list[Part]) -> Iterable[_Job]:
    """Every layer and raw parameter that some adapter updates, in the model's order."""
    for path, module in model.named_modules():
        found = [(part, part.record.draft.pairs[path]) for part in parts if path in part.record.draft.pairs]
        if found:
            yield _job(path, "", leaf_layout(module, [pair for _, pair in found]), found)
        groups = [part.record.draft.raw.get(path, {}) for part in parts]
        for name in dict.fromkeys(name for name in module._parameters if any(name in group for group in groups)):
            raw = [(part, group[name]) for part, group in zip(parts, groups, strict=True) if name in group]
            yield _job(path, name, raw_layout(module, name), raw)


def _job(path: str, name: str, layout: Layout, found: list[tuple[Part, Pair]]) -> _Job:
    dtype, computed = widest([tensor for _, pair in found for tensor in pair.learnt()])
    updates = [Update(*layout.opened(pair, computed), pair.scale, part.weight) for part, pair in found]
    biases = [
        pair.bias.detach().to(layout.device, computed) * update.strength
        for (_, pair), update in zip(found, updates, strict=True)
        if pair.bias is not None
    ]
    return _Job(path, name, layout, updates, dtype, torch.stack(biases).sum(0) if biases else None)


def _harmonised(model: nn.Module, done: list[tuple[_Job, Result]]) -> list[Place]:
    """The results, those of one module's raw parameters with one rank and scale: PEFT's files have one for all of them."""
    groups: dict[str, list[tuple[_Job, Result]]] = {}
    for job, result in done:
        groups.setdefault(_home(model, job), []).append((job, result))
    places = []
    for group in groups.values():
        rank = max(a.shape[1] for _, (a, _, _) in group)
        scale = max(scale for _, (_, _, scale) in group)
        for job, (a, b, own) in group:
            missing = rank - a.shape[1]
            a = torch.nn.functional.pad(a * (own / scale), (0, 0, 0, missing))
            b = torch.nn.functional.pad(b, (0, 0, 0, missing))
            A, Bt = job.layout.closed(a, b, job.dtype)
            if not bool(A.isfinite().all() and Bt.isfinite().all()):
                raise _too_large(job)
            bias = None if job.bias is None else (job.bias / scale).to(job.dtype)
            places.append(Place(job.path, job.name, A, Bt, rank * job.layout.groups, scale, bias))
    return places


def _too_large(job: _Job) -> AdapterError:
    return AdapterError(
        f"{job.path}{'.' if job.name else ''}{job.name}: the combination has numbers that {job.dtype} cannot hold. Choose "
        "smaller weights."
    )


def _home(model: nn.Module, job: _Job) -> str:
    """What shares its rank with others: a module with raw parameters, an attention layer with its output projection."""
    parent = job.path.rpartition(".")[0]
    inside = bool(job.name) and is_attention(plain(type(model.get_submodule(parent))))
    return parent if inside else job.path


def _put(draft: Draft, place: Place, method: LoRA) -> None:
    bias = place.bias
    if method.lora_bias and bias is None:
        bias = place.Bt.new_zeros(place.Bt.shape[1])
    pair = Pair(place.A, place.Bt, method.scaling(place.path), bias=bias)
    if place.name:
        draft.raw.setdefault(place.path, {})[place.name] = pair
    else:
        draft.pairs[place.path] = pair
