"""Products by oneDNN against float64, who is asked to compute them, and that evaluation keeps the base's bits."""

import adapting
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.core import cross_entropy, gemm
from lorakit.core.autograd import LowRankLinear
from lorakit.core.cross_entropy import head_cross_entropy
from lorakit.core.grouped import Layer, Pair, grouped_linear
from lorakit.core.mlp import low_rank_mlp
from lorakit.core.siblings import Member, low_rank_siblings
from lorakit.errors import UsageError

MARK = torch.tensor(1)


@pytest.fixture
def onednn(monkeypatch):
    """Every product of two matrices in float32 goes to oneDNN, however small; yields how many did."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    seen = []
    asked = gemm.by_onednn

    def counted(x, weight, tokens):
        seen.append(asked(x, weight, tokens))
        return seen[-1]

    monkeypatch.setattr(gemm, "backend", lambda: "onednn")
    monkeypatch.setattr(gemm, "LEAST", 0)
    monkeypatch.setattr(gemm, "by_onednn", counted)
    return seen


@pytest.fixture
def choice(monkeypatch):
    """Choose anew with LORAKIT_GEMM set, and the processor of that maker."""

    def choose(value, maker=None):
        monkeypatch.setenv("LORAKIT_GEMM", value)
        if maker is not None:
            monkeypatch.setattr(gemm, "processor", lambda: maker)
        gemm.backend.cache_clear()
        return gemm.backend()

    yield choose
    monkeypatch.undo()
    gemm.backend.cache_clear()


def near(ours, exact, tolerance=2e-6):
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(96, 384, 256), (8, 160, 512), (304, 8, 200)])
def test_a_product_is_that_of_float64(onednn, shape, transposed, biased):
    rows, d_in, d_out = shape
    x = torch.randn(rows, d_in)
    weight = torch.randn(d_in, d_out).t() if transposed else torch.randn(d_out, d_in)
    bias = torch.randn(d_out) if biased else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    near(gemm.product(x, weight, bias), exact)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert onednn == [True]


def member(d_in, d_out, transposed):
    """A layer in float64, which `.float()` of each tensor makes one in float32."""
    shape = (d_in, d_out) if transposed else (d_out, d_in)
    tensors = [torch.randn(*size, dtype=torch.float64) for size in (shape, (d_out,), (4, d_in), (4, d_out))]
    return Member(*tensors, 0.7, transposed, False)


def of_type(one, dtype):
    made = [tensor.detach().to(dtype) for tensor in one[:4]]
    return Member(made[0], *(tensor.requires_grad_() for tensor in made[1:]), *one[4:])


def linear(x, members):
    return [LowRankLinear.apply(x, *members[0], MARK, 1)]


def siblings(x, members):
    return list(low_rank_siblings(x, members[:2], 0.0, MARK, 1))


def mlp(x, members):
    return [low_rank_mlp(x, members[:2], members[2], "silu", MARK, 1)]


def grouped(x, members):
    layers = [
        Layer(one.weight, one.bias, one.transposed, (Pair(one.A, one.Bt, one.scale), None), False)
        for one in [one._replace(bias=one.bias.detach()) for one in members[:2]]
    ]
    return list(grouped_linear(x, [(0, 9), (9, 15)], layers, MARK, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("function", [linear, siblings, mlp, grouped])
def test_the_fused_functions_by_onednn_are_float64s(onednn, function, transposed):
    drawn = [member(24, 40, transposed), member(24, 40, transposed), member(40, 24, transposed)]
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        own, members = x.to(dtype).requires_grad_(), [of_type(one, dtype) for one in drawn]
        ys = function(own, members)
        sum((y * y).sum() for y in ys).backward()
        grads = [tensor.grad for one in members for tensor in one[1:4] if tensor.grad is not None]
        found.append([*ys, own.grad, *grads])
    assert any(onednn)
    assert len(found[0]) == len(found[1]) > 3
    for ours, exact in zip(*found, strict=True):
        near(ours, exact)


@pytest.mark.parametrize("piece", [30, 4096])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_through_a_head_by_onednn_is_float64s(onednn, smoothing, piece, monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", piece)
    hidden, weight, labels = torch.randn(300, 24), torch.randn(70, 24), torch.randint(70, (300,))
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = head_cross_entropy(ours, weight, None, labels, smoothing)
    loss.backward()
    logits = exact @ weight.double().t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    assert any(onednn)
    near(loss, expected)
    near(ours.grad, exact.grad)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta"])
def test_a_fresh_adapter_changes_no_bit_in_evaluation(onednn, kind):
    model = tiny.MODELS[kind]()
    inputs = tiny.batch(model)
    base = model.requires_grad_(False)(**inputs).logits
    lk.attach(model, lk.LoRA(r=4, target_modules="all-linear"), name="a")
    out = model(**inputs).logits
    assert out.requires_grad
    assert torch.equal(out, base)
    assert any(onednn)  # the low-rank products, which add zeros
    adapting.grow(model, "a")
    evaluated, trained = model(**inputs).logits, model.train()(**inputs).logits
    if kind == "llama":  # the others draw dropout
        torch.testing.assert_close(trained, evaluated)


def test_what_is_small_or_no_float32_stays_with_torch(monkeypatch):
    monkeypatch.setattr(gemm, "backend", lambda: "onednn")
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    assert gemm.by_onednn(x, weight, 64)
    assert not gemm.by_onednn(x[:8], weight, 8)
    assert not gemm.by_onednn(x.double(), weight.double(), 64)
    assert not gemm.by_onednn(torch.randn(512, 64).t(), weight, 64)
    assert not gemm.by_onednn(x.to("meta"), weight.to("meta"), 64)


def test_where_avx512_is_missing_a_weight_must_lie_by_outputs(monkeypatch):
    monkeypatch.setattr(gemm, "backend", lambda: "onednn")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x, weight = torch.randn(128, 512), torch.randn(512, 256).t()
    assert not gemm.by_onednn(x, weight, 128)
    assert gemm.by_onednn(x, weight.contiguous(), 128)
    assert gemm.by_onednn(x[:32], weight, 32)  # few rows are read well in either order


def test_few_numbers_of_tokens_are_aligned_and_none_is_far(monkeypatch):
    """oneDNN keeps code for each shape: a run's batches of any length may meet few."""
    counts = range(1, 5000)
    found = [gemm.aligned(count) for count in counts]
    assert all(gemm.aligned(one) == one for one in found)
    assert all(count <= one <= count * 17 / 16 for count, one in zip(counts, found, strict=True))
    assert all(len({one for one in found if begin < one <= 2 * begin}) == 16 for begin in (32, 256, 2048))
    assert sum(found) < 1.03 * sum(counts)
    monkeypatch.setattr(gemm, "backend", lambda: "onednn")
    x, weight = torch.randn(257, 512), torch.randn(256, 512)
    assert not gemm.by_onednn(x, weight, 257)
    assert gemm.by_onednn(x[:256], weight, 256)


@pytest.mark.parametrize(("maker", "expected"), [("GenuineIntel", "torch"), ("AuthenticAMD", "onednn")])
def test_mkl_stays_on_its_makers_processors(choice, maker, expected):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        pytest.skip("this build of torch has not both libraries")
    assert choice("auto", maker) == expected
    assert choice("torch", maker) == "torch"
    assert choice("onednn", maker) == "onednn"


def test_an_unknown_library_is_an_error(choice):
    with pytest.raises(UsageError, match="expected one of auto, torch, onednn"):
        choice("openblas")
