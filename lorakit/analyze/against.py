"""An update held against the weight that it is added to (section 7.3, Table 7; appendix H.4, Figure 8)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.analyze.spectrum import Directions
from lorakit.analyze.subspace import random_basis
from lorakit.analyze.updates import Adapter, Update
from lorakit.attach.adapted import plain
from lorakit.attach.host import check_not_merged, find_host
from lorakit.attach.kinds import is_attention, low_rank_kind
from lorakit.attach.quantized import is_quantized
from lorakit.errors import UsageError
from lorakit.models import load
from lorakit.store.layouts import fit

EXACT = 1024  # the narrower side up to which all of a weight's directions are computed
SPARE, ROUNDS = 16, 8  # of the subspace iteration above it
PEFT_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification", "SEQ_2_SEQ_LM": "seq2seq"}


@dataclass(frozen=True)
class Amplification:
    """A row of Table 7. All are Frobenius norms; U, V: the singular vectors of dW, as many as its rank r.

    weight: ||W||. moved: ||dW|| / ||W||. projected: ||U^T W V||, W within the update's own directions. own: the same in W's r
    top directions, the most that any could hold. random: in random ones. factor: ||dW|| / ||U^T W V||, how much the update
    amplifies what W has in its directions; random_factor: ||dW|| / random, what a random update of this size would show.
    """

    weight: float
    moved: float
    projected: float
    own: float
    random: float
    factor: float | None
    random_factor: float | None


def open_model(base: str | nn.Module, adapter: Adapter) -> nn.Module:
    """The base model itself, or loaded by name, for the task that the adapter was trained for.

    Raises FileError where the adapter does not fit it, ModelError where it cannot be loaded, AdapterError where an adapter is
    merged into it.
    """
    model = base if isinstance(base, nn.Module) else _load(base, adapter)
    host = find_host(model)
    if host is not None:
        check_not_merged(host)
    fit(adapter.file, model, check_base=True)
    return model


def _load(name: str, adapter: Adapter) -> nn.Module:
    notes, config = adapter.file.extra, adapter.file.config
    task = notes.get("task") or PEFT_TASKS.get(str(config.get("task_type"))) or "causal-lm"
    labels = notes.get("label_names") if "classification" in task else None
    heads = [tensor.shape[0] for tensor in adapter.file.parsed.plain.values() if tensor.dim() == 2]
    outputs = min(heads, default=None) if "classification" in task and labels is None else None
    with torch.random.fork_rng(devices=[]):  # a head that the files lack is drawn, and never looked at
        loaded = load(
            name, task=task, label_names=labels, num_labels=outputs if outputs != 1 else None, regression=outputs == 1
        )
    model: nn.Module = loaded.model
    return model


def weights_of(model: nn.Module, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """path -> the base's weight as (out, in), a view; without those that are no plain matrix (experts, quantised ones)."""
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for path, update in updates.items():
        weight = None if update.is_part else _weight(modules, path)
        if weight is not None and not is_quantized(weight) and tuple(weight.shape) == update.shape:
            found[path] = weight.detach()
    return found


def _weight(modules: Mapping[str, nn.Module], path: str) -> Tensor | None:
    module = modules.get(path)
    if module is None:  # PEFT's name for the output of torch's attention layer
        module = modules.get(path.replace(".base_layer", ""))
    if module is None:
        return None
    if is_attention(plain(type(module))):
        return module._parameters.get("in_proj_weight")
    kind, weight = low_rank_kind(plain(type(module))), module._parameters.get("weight")
    if kind is None or weight is None or is_quantized(weight):
        return None
    return kind.as_matrix(weight).flatten(1)


def amplification(found: Directions, weight: Tensor, own: Directions) -> Amplification:
    """Table 7's row. found: of the update; weight: (out, in); own: the weight's top directions, at least as many."""
    w = weight.double()
    r = found.values.numel()
    norm, whole = float(found.values.norm()), float(w.norm())
    projected = _within(w, found.left, found.right)
    random = _within(w, random_basis(w.shape[0], r, 3), random_basis(w.shape[1], r, 4))
    return Amplification(
        weight=whole,
        moved=norm / whole if whole else 0.0,
        projected=projected,
        own=float(own.values[:r].norm()),
        random=random,
        factor=norm / projected if projected else None,
        random_factor=norm / random if random else None,
    )


def _within(weight: Tensor, left: Tensor, right: Tensor) -> float:
    return float((left.t() @ weight @ right).norm())


def top_directions(weight: Tensor, k: int) -> Directions:
    """The k largest singular values of a weight (out, in) and their vectors.

    Up to EXACT on the narrower side by the eigenvectors of its Gram matrix, in float64; above by subspace iteration (Halko et
    al. 2011, algorithm 4.4; ROUNDS rounds, SPARE more directions), whose values are right to about 1e-3 where they decay as a
    trained weight's do.
    """
    if not 1 <= k <= min(weight.shape):
        raise UsageError(f"a matrix of {tuple(weight.shape)} has 1 to {min(weight.shape)} directions, not {k}.")
    if weight.shape[0] > weight.shape[1]:
        flipped = top_directions(weight.t(), k)
        return Directions(flipped.right, flipped.values, flipped.left)
    if weight.shape[0] <= EXACT:
        w = weight.double()
        left = torch.linalg.eigh(w @ w.t()).eigenvectors.flip(1)[:, :k]  # (out, k), largest first
    else:
        w = weight.float()
        basis = random_basis(w.shape[1], min(k + SPARE, w.shape[0]), 5).float()
        for _ in range(ROUNDS):
            basis = torch.linalg.qr(w.t() @ torch.linalg.qr(w @ basis).Q).Q
        w, left = w.double(), torch.linalg.qr(w @ basis).Q.double()
    return _refined(w, left, k)


def _refined(w: Tensor, left: Tensor, k: int) -> Directions:
    """The singular vectors within the span of `left`: (out, q) orthonormal."""
    q, r = torch.linalg.qr((left.t() @ w).t())  # (in, q), (q, q)
    u, s, vh = torch.linalg.svd(r.t(), full_matrices=False)
    return Directions(left @ u, s, q @ vh.t()).top(k)
