"""The grouped functions against autograd's own graph in float64, and a route's gradients against the reference path."""

import adapting
import pytest
import tiny
import torch
from torch.nn import functional as F

import lorakit as lk
from lorakit.core import kernels
from lorakit.core.cross_entropy import CHUNK, grouped_cross_entropy, head_cross_entropy
from lorakit.core.grouped import Layer, Pair, grouped_linear, stretches
from lorakit.errors import AdapterError

MARK = torch.tensor(1)
SPANS = [(0, 3), (3, 4), (6, 10)]  # rows 4 and 5 take the base


def draw(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def layer(d_out, transposed, ranks, biased=True):
    weight = draw(8, d_out, grad=False) if transposed else draw(d_out, 8, grad=False)
    pairs = tuple(None if r is None else Pair(draw(r, 8), draw(r, d_out), 0.3 * r) for r in ranks)
    return Layer(weight, draw(d_out, grad=False) if biased else None, transposed, pairs)


def reference(x, one):
    flat = x.reshape(-1, 8)
    y = F.linear(flat, one.weight.t() if one.transposed else one.weight, one.bias)
    for (start, stop), pair in zip(SPANS, one.pairs, strict=True):
        if pair is not None:
            rows = torch.zeros(10, 1, dtype=torch.float64)
            rows[start:stop] = pair.scale
            y = y + rows * (flat @ pair.A.t() @ pair.Bt)
    return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_and_gradients_are_the_formulas(transposed):
    layers = [
        layer(6, transposed, (1, 4, None)),
        layer(5, transposed, (3, None, None), False),
        layer(6, transposed, (2, 2, 2)),
    ]
    x = draw(5, 2, 8)
    ours = grouped_linear(x, SPANS, layers, MARK, 1)
    theirs = [reference(x, one) for one in layers]
    learnt = [x, *(tensor for one in layers for pair in one.pairs if pair is not None for tensor in pair[:2])]
    weights = [torch.randn_like(y) for y in ours]
    for skipped in (None, 1):  # an output that nobody uses has no gradient
        used = [i for i in range(3) if i != skipped]
        found, expected = (
            torch.autograd.grad(
                sum((ys[i] * weights[i]).sum() for i in used), learnt, retain_graph=True, allow_unused=True
            )
            for ys in (ours, theirs)
        )
        for y, z in zip(ours, theirs, strict=True):
            torch.testing.assert_close(y, z)
        for tensor, one, other in zip(learnt, found, expected, strict=True):
            empty = torch.zeros_like(tensor)
            torch.testing.assert_close(empty if one is None else one, empty if other is None else other)


def test_a_switch_under_checkpointing_is_an_error():
    x = draw(5, 2, 8)
    (y,) = grouped_linear(x, SPANS, [layer(6, False, (1, 1, 1))], MARK, 2)
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        y.sum().backward()


def test_stretches():
    assert stretches((0, 0, -1, 1)) == ((0, 0, 2), (1, 3, 4))
    assert stretches((1, 0, 0)) == ((1, 0, 1), (0, 1, 3))
    assert stretches((0, 1, 0)) is None
    assert stretches((-1, -1)) == ()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_each_stretch_has_its_own_loss(smoothing, biased):
    counts = [CHUNK - 3, 0, 5, 7]  # the second chunk begins within a stretch; one is empty
    hidden, weight = draw(sum(counts), 8), draw(11, 8, grad=False)
    bias = draw(11, grad=False) if biased else None
    labels = torch.randint(11, (sum(counts),))
    ours = grouped_cross_entropy(hidden, weight, bias, labels, counts, smoothing)
    logits = F.linear(hidden, weight, bias)
    parts = zip(logits.split(counts), labels.split(counts), strict=True)
    theirs = torch.stack([F.cross_entropy(a, b, reduction="sum", label_smoothing=smoothing) for a, b in parts])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours.sum(), head_cross_entropy(hidden, weight, bias, labels, smoothing))
    weights = torch.tensor([0.5, 3.0, 2.0, -1.0], dtype=torch.float64)
    (found,), (expected,) = (torch.autograd.grad((y * weights).sum(), hidden) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("rows", [["a", "a", None, "b"], ["b", "a", "a"], ["a", "b", "a"]])
def test_a_routed_backward_is_the_reference_paths(kind, rows, monkeypatch):
    model = tiny.MODELS[kind]()
    for name, rank in (("a", 4), ("b", 2)):
        lk.attach(model, lk.LoRA(r=rank, alpha=6, target_modules="all-linear"), name=name, seed=rank)
        adapting.grow(model, name, rank)
    inputs = tiny.batch(model, rows=len(rows))
    learnt = [*lk.parameters(model, "a"), *lk.parameters(model, "b")]
    found = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "fused", fused)
        with lk.route(model, rows):
            logits = model(**inputs).logits
        found.append([logits, *torch.autograd.grad(logits.square().mean(), learnt)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
