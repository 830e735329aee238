"""The loss through a head by pieces of its vocabulary, where rounding, infinities and labels could go wrong."""

import pytest
import torch

from lorakit.core import cross_entropy
from lorakit.core.cross_entropy import head_cross_entropy
from lorakit.errors import UsageError


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", 8)
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)


def both(hidden, weight, bias, labels, smoothing=0.0):
    """(loss, gradient) of ours and of float64."""
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = head_cross_entropy(ours, weight, bias, labels, smoothing)
    loss.backward()
    logits = torch.nn.functional.linear(exact, weight.double(), None if bias is None else bias.double())
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    return (loss.detach(), ours.grad), (expected.detach(), exact.grad)


@pytest.mark.parametrize("classes", [1, 7, 8, 9, 31, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("biased", [False, True])
def test_every_split_of_the_vocabulary_gives_the_same(classes, smoothing, biased):
    draw = torch.Generator().manual_seed(classes)
    hidden, weight = torch.randn(10, 6, generator=draw), 3 * torch.randn(classes, 6, generator=draw)
    bias = torch.randn(classes, generator=draw) if biased else None
    labels = torch.randint(classes, (10,), generator=draw)
    (loss, grad), (expected, wanted) = both(hidden, weight, bias, labels, smoothing)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_sure_keeps_the_digits_of_its_loss():
    """Logits of some 30, a loss of some 1e-8: their difference in float32 would be 0 or 2e-6."""
    weight = torch.eye(20)
    hidden = torch.zeros(3, 20)
    hidden[torch.arange(3), torch.tensor([0, 9, 19])] = torch.tensor([15.0, 12.0, 10.0])
    hidden += 30.0
    (loss, _), (expected, _) = both(hidden, weight, None, torch.tensor([0, 9, 19]))
    assert 1e-5 < float(expected) < 1e-2
    assert float(loss) == pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize("ruled_out", [slice(0, 7), slice(7, 12), slice(3, 12, 4)])
def test_logits_that_are_large_or_minus_infinity(ruled_out):
    """A bias may rule classes out, a whole piece of them too."""
    weight = torch.tensor([[1e4], [-1e4], *([[0.0]] * 10), [9.9e3]])
    bias = torch.zeros(13)
    bias[ruled_out] = -torch.inf
    (loss, grad), (expected, wanted) = both(torch.tensor([[1.0], [-1.0], [0.0]]), weight, bias, torch.full((3,), 12))
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-2)


def test_what_is_no_number_stays_none():
    hidden = torch.randn(3, 6)
    hidden[1, 2] = torch.nan
    assert torch.isnan(head_cross_entropy(hidden, torch.randn(20, 6), None, torch.tensor([1, 2, 19]), 0.0))


@pytest.mark.parametrize("label", [-100, -1, 20])
def test_a_label_outside_of_the_vocabulary_is_refused(label):
    with pytest.raises(UsageError, match="from 0 to 19"):
        head_cross_entropy(torch.randn(2, 6), torch.randn(20, 6), None, torch.tensor([3, label]), 0.0)
