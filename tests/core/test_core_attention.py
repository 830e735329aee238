"""Attention with dropout as one node, and dropout alone, against autograd's own graph in float64 with the same entries gone."""

import pytest
import torch

from lorakit.core.attention import dropped_attention
from lorakit.core.dropout import FEW, draw, dropped, keep_mask, zeroed_

MASKS = {
    "none": None,
    "added": torch.zeros(2, 1, 5, 7, dtype=torch.float64).masked_fill_(torch.arange(7) > 4, -1e9),
    "boolean": torch.arange(7) <= torch.arange(5)[:, None].view(1, 1, 5, 1) + 2,
}


def inputs():
    torch.manual_seed(0)
    sizes = (5, 7, 7)  # queries, keys, values
    made = [torch.randn(2, size, 3, 4, dtype=torch.float64).transpose(1, 2) for size in sizes]  # as models have them
    return [one.requires_grad_() for one in made]


@pytest.mark.parametrize("probability", [0.1, 0.4])
@pytest.mark.parametrize("mask", MASKS)
def test_dropped_attention_is_its_steps(mask, probability):
    assert (probability <= FEW) == (probability == 0.1)  # both ways to draw
    query, key, value = inputs()
    torch.manual_seed(3)
    ours = dropped_attention(query, key, value, MASKS[mask], probability, 0.3)
    torch.manual_seed(3)
    drawn, factor = draw(torch.empty(6, 5, 7), probability)
    keep = zeroed_(torch.ones(6, 5, 7, dtype=torch.float64), drawn).view(2, 3, 5, 7)
    assert 0 < float((keep == 0).sum()) < keep.numel()
    scores = 0.3 * query @ key.transpose(-1, -2)
    if mask == "boolean":
        scores = scores.masked_fill(~MASKS[mask], float("-inf"))
    elif mask == "added":
        scores = scores + MASKS[mask]
    theirs = (scores.softmax(-1) * keep * factor) @ value
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    found = torch.autograd.grad((ours * weight).sum(), [query, key, value])
    expected = torch.autograd.grad((theirs * weight).sum(), [query, key, value])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_with_next_to_no_dropout_it_is_torchs_attention():
    query, key, value = inputs()
    ours = dropped_attention(query, key, value, MASKS["added"], 1e-9, 0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, MASKS["added"], scale=0.5)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("probability", [0.1, 0.4])
def test_dropout_goes_back_where_it_went_forward(probability):
    x = torch.randn(3, 50, 40).transpose(0, 1).requires_grad_()  # not contiguous
    torch.manual_seed(5)
    y = dropped(x, probability)
    torch.manual_seed(5)
    drawn, factor = draw(x, probability)
    keep = zeroed_(torch.ones(50, 3, 40), drawn)
    torch.testing.assert_close(y, x * keep * factor, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(grad, keep * factor, rtol=0, atol=0)


def test_numbers_of_what_goes_and_the_mask_say_the_same():
    torch.manual_seed(6)
    drawn, factor = draw(torch.empty(30, 40), 0.1)
    torch.manual_seed(6)
    mask, other = keep_mask(torch.empty(30, 40), 0.1)
    assert torch.equal(zeroed_(torch.ones(30, 40), drawn), mask.float())
    assert factor == other


def test_zeros_are_written_where_torch_refuses_what_may_not_be_deterministic():
    x, drawn = torch.randn(30, 40), draw(torch.empty(30, 40), 0.1)[0]
    expected = zeroed_(x.clone(), drawn)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(zeroed_(x.clone(), drawn), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 < int((expected == 0).sum()) == len(drawn)
