"""The fused functions of several layers against autograd's own graph in float64, and the cheap dropout against its law."""

import math

import pytest
import torch
from torch.nn import functional as F

from lorakit.core import dropout, mlp
from lorakit.core.dropout import keep_mask
from lorakit.core.mlp import low_rank_mlp
from lorakit.core.siblings import Member, low_rank_siblings

MARK = torch.tensor(1)
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda a: F.gelu(a, approximate="tanh")}


def member(d_in, d_out, transposed, biased=True):
    def draw(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

    shape = (d_in, d_out) if transposed else (d_out, d_in)
    return Member(
        draw(*shape, grad=False), draw(d_out) if biased else None, draw(3, d_in), draw(3, d_out), 0.7, transposed
    )


def plain(x, one, dropped=None):
    weight = one.weight.t() if one.transposed else one.weight
    return F.linear(x, weight, one.bias) + one.scale * ((x if dropped is None else dropped) @ one.A.t()) @ one.Bt


def learnt(members):
    return [tensor for one in members for tensor in (one.bias, one.A, one.Bt) if tensor is not None]


def agree(ours, theirs, inputs):
    """Outputs and all gradients of two computations."""
    weights = [torch.randn_like(y) for y in ours]
    for y, z in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, z)
    found = torch.autograd.grad(sum((y * w).sum() for y, w in zip(ours, weights, strict=True)), inputs)
    expected = torch.autograd.grad(sum((y * w).sum() for y, w in zip(theirs, weights, strict=True)), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.12, 0.4])
@pytest.mark.parametrize("transposed", [False, True])
def test_siblings_are_their_members(transposed, dropout):
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    members = [member(8, 6, transposed), member(8, 4, transposed, biased=False), member(8, 6, transposed)]
    torch.manual_seed(2)
    ours = low_rank_siblings(x, members, dropout, MARK, 1)
    torch.manual_seed(2)
    keep, factor = keep_mask(x.reshape(-1, 8), dropout)
    dropped = x * keep.view(x.shape) * factor
    agree(ours, [plain(x, one, dropped) for one in members], [x, *learnt(members)])


def test_a_sibling_whose_output_is_not_used_gets_no_gradient():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    members = [member(8, 6, False), member(8, 4, False)]
    first, _ = low_rank_siblings(x, members, 0.0, MARK, 1)
    found = torch.autograd.grad(first.sum(), [x, *learnt(members[:1])], retain_graph=True)
    expected = torch.autograd.grad(plain(x, members[0]).sum(), [x, *learnt(members[:1])])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    (unused,) = torch.autograd.grad(first.sum(), [members[1].Bt], allow_unused=True)
    assert unused is None


def test_frozen_inputs_cost_no_gradient():
    x = torch.randn(5, 8, dtype=torch.float64)  # the first adapted layer's
    members = [member(8, 6, False), member(8, 6, False)]
    agree(low_rank_siblings(x, members, 0.0, MARK, 1), [plain(x, one) for one in members], learnt(members))


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_feed_forward_part_is_its_layers(activation, gated, transposed):
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    inner, outer = [member(8, 7, transposed) for _ in range(1 + gated)], member(7, 8, transposed)
    ours = low_rank_mlp(x, inner, outer, activation, MARK, 1)
    h = ACTS[activation](plain(x, inner[0]))
    theirs = plain(h * plain(x, inner[1]) if gated else h, outer)
    agree([ours], [theirs], [x, *learnt([*inner, outer])])


@pytest.mark.parametrize("dropout", [0.12, 0.4])
@pytest.mark.parametrize("gated", [True, False])
def test_the_feed_forward_part_drops_what_its_layers_would(gated, dropout):
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    inner, outer = [member(8, 7, False) for _ in range(1 + gated)], member(7, 8, False)
    torch.manual_seed(2)
    ours = low_rank_mlp(x, inner, outer, "silu", MARK, 1, dropout)
    torch.manual_seed(2)
    keep, factor = keep_mask(x.reshape(-1, 8), dropout)
    assert not keep.all()
    dropped = x * keep.view(x.shape) * factor
    h = F.silu(plain(x, inner[0], dropped))
    h = h * plain(x, inner[1], dropped) if gated else h
    keep, factor = keep_mask(h.reshape(-1, 7), dropout)
    assert not keep.all()
    agree([ours], [plain(h, outer, h * keep.view(h.shape) * factor)], [x, *learnt([*inner, outer])])


def test_gating_in_several_stretches_is_gating(monkeypatch):
    monkeypatch.setattr(mlp, "ROWS", 4)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)  # 10 tokens: 4, 4 and 2
    inner, outer = [member(8, 7, False) for _ in range(2)], member(7, 8, False)
    theirs = plain(F.silu(plain(x, inner[0])) * plain(x, inner[1]), outer)
    agree([low_rank_mlp(x, inner, outer, "silu", MARK, 1)], [theirs], [x, *learnt([*inner, outer])])


def test_a_second_derivative_is_refused():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    outputs = low_rank_siblings(x, [member(8, 6, False)], 0.0, MARK, 1)[0]
    outputs = outputs + low_rank_mlp(x, [member(8, 7, False)], member(7, 6, False), "silu", MARK, 1)
    (first,) = torch.autograd.grad(outputs.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share_at_random(probability):
    torch.manual_seed(4)
    mask, factor = keep_mask(torch.empty(1001, 997), probability)
    spread = 5 * math.sqrt(probability * (1 - probability) / mask.numel())
    assert mask.float().mean().item() == pytest.approx(1 - probability, abs=spread)
    assert factor == pytest.approx(1 / (1 - probability), rel=1e-4)
    neighbours = (mask[:, 1:] & mask[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx((1 - probability) ** 2, abs=2 * spread)  # neighbours are independent
    torch.manual_seed(4)
    again, _ = keep_mask(torch.empty(1001, 997), probability)
    assert torch.equal(mask, again)
    assert not torch.equal(mask, keep_mask(torch.empty(1001, 997), probability)[0])


@pytest.mark.parametrize("probability", [0.02, 0.125])
def test_each_place_of_a_small_mask_is_as_likely_to_go(probability):
    torch.manual_seed(5)
    masks = torch.stack([keep_mask(torch.empty(4, 3), probability)[0] for _ in range(20_000)])
    spread = 5 * math.sqrt(probability * (1 - probability) / len(masks))
    gone = 1 - masks.double().mean(0)
    assert (gone - probability).abs().max().item() < spread
    together = ((1 - masks[:, 0, 0]) * (1 - masks[:, -1, -1])).double().mean().item()
    assert together == pytest.approx(probability**2, abs=spread)


@pytest.mark.parametrize(("count", "probability"), [(0, 0.1), (1, 0.1), (5, 1e-30)])
def test_masks_of_next_to_nothing(count, probability):
    mask, factor = keep_mask(torch.empty(count), probability)
    assert mask.shape == (count,)
    assert mask.dtype == torch.int8
    assert factor == pytest.approx(1 / (1 - probability))


def test_distances_that_end_too_soon_are_drawn_on(monkeypatch):
    torch.manual_seed(6)
    monkeypatch.setattr(dropout, "MARGIN", -17)  # about half of what is needed
    gone = dropout._dropped(10_000, 0.1)
    assert gone.diff().min() > 0
    assert gone[-1] < 10_000
    assert len(gone) == pytest.approx(1_000, abs=150)


def test_a_mask_does_not_follow_torchs_default_type():
    torch.manual_seed(7)
    wanted, _ = keep_mask(torch.empty(5000), 0.05)
    torch.manual_seed(7)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = keep_mask(torch.empty(5000), 0.05)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted)
