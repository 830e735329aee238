"""The fused function against float64 autograd of the plain formula."""

import pytest
import torch

from lorakit.core.autograd import LowRankLinear, check_epoch
from lorakit.core.delta import add_low_rank_, delta_weight, low_rank_lookup
from lorakit.errors import AdapterError

IN, OUT, R, SCALE = 24, 40, 3, 1.7


def inputs(shape, *, transposed=False, dtype=torch.float32, x_grad=True, strided=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(*shape, IN)
    if strided:
        x = draw(*shape[:-1], IN, shape[-1]).transpose(-1, -2)
        assert not x.is_contiguous()
    weight = draw(IN, OUT) if transposed else draw(OUT, IN)
    return x.requires_grad_(x_grad), weight, draw(OUT), draw(R, IN).requires_grad_(), draw(R, OUT).requires_grad_()


def fused(x, weight, bias, A, Bt, transposed):
    return LowRankLinear.apply(x, weight, bias, A, Bt, SCALE, transposed, True, torch.tensor(7), 7)


def formula(x, weight, bias, A, Bt, transposed):
    y = x @ (weight if transposed else weight.T) + SCALE * (x @ A.T) @ Bt
    return y if bias is None else y + bias


def gradients(function, tensors, transposed, dy):
    x, weight, bias, A, Bt = tensors
    y = function(x, weight, bias, A, Bt, transposed)
    wanted = [t for t in (x, bias, A, Bt) if t is not None and t.requires_grad]
    return y, torch.autograd.grad(y, wanted, dy.to(y.dtype))


def compare(tensors, transposed, tolerance):
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(*tensors[0].shape[:-1], OUT, generator=generator, dtype=torch.float64)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    y, found = gradients(fused, tensors, transposed, dy)
    y64, expected = gradients(formula, exact, transposed, dy)
    for ours, theirs in zip((y, *found), (y64, *expected), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == tensors[0].dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", ["none", "frozen", "trainable"])
@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize(
    ("shape", "strided"), [((5,), False), ((5,), True), ((3, 7), False), ((3, 7), True), ((), False)]
)
def test_gradients_equal_float64(transposed, bias, x_grad, shape, strided):
    x, weight, b, A, Bt = inputs(shape, transposed=transposed, x_grad=x_grad, strided=strided)
    b = None if bias == "none" else b.requires_grad_(bias == "trainable")
    compare((x, weight, b, A, Bt), transposed, 1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_bf16_are_right_to_rounding(transposed):
    x, weight, b, A, Bt = inputs((3, 7), transposed=transposed, dtype=torch.bfloat16)
    compare((x, weight, b.requires_grad_(), A, Bt), transposed, 2e-2)


@pytest.mark.parametrize("frozen", [(3,), (4,), (3, 4)])
def test_factors_that_want_no_gradient_get_none(frozen):
    tensors = list(inputs((3, 7)))
    for position in frozen:
        tensors[position].requires_grad_(False)
    compare(tensors, False, 1e-5)


def test_no_tokens_give_zero_gradients():
    x, weight, b, A, Bt = inputs((0,))
    fused(x, weight, b, A, Bt, False).sum().backward()
    assert x.grad.shape == (0, IN)
    assert not A.grad.any()
    assert not Bt.grad.any()


def test_double_backward_is_refused():
    x, weight, b, A, Bt = inputs((5,))
    (dx,) = torch.autograd.grad(fused(x, weight, b, A, Bt, False).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_input_changed_in_place_before_backward_is_an_error():
    x, weight, b, A, Bt = inputs((5,), x_grad=False)
    y = fused(x, weight, b, A, Bt, False)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_mark_of_another_epoch_raises():
    check_epoch(torch.tensor(3), 3)
    with pytest.raises(AdapterError, match="checkpointing"):
        check_epoch(torch.tensor(4), 3)


def test_delta_and_its_product_agree():
    x, _, _, A, Bt = inputs((3, 7), x_grad=False)
    A, Bt = A.detach(), Bt.detach()
    y = torch.zeros(3, 7, OUT)
    torch.testing.assert_close(add_low_rank_(y, x, A, Bt, SCALE), x @ delta_weight(A, Bt, SCALE).T)
    exact = SCALE * Bt.double().T @ A.double()
    torch.testing.assert_close(delta_weight(A, Bt, SCALE, dtype=torch.float64), exact, rtol=1e-14, atol=1e-14)


def test_lookup_is_a_row_of_the_delta():
    At, Bt = torch.randn(11, R), torch.randn(R, 6)
    ids = torch.tensor([[0, 3], [10, 3]])
    torch.testing.assert_close(low_rank_lookup(ids, At, Bt), (At @ Bt)[ids])
