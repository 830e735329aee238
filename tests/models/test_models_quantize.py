"""A base in 4 or 8 bits: what is quantised, how closely, in what memory, and what is refused."""

import builtins
import copy
import importlib.util
import logging

import pytest
import tiny
import torch
from torch import nn

from lorakit import models
from lorakit.attach.anatomy import output_head
from lorakit.attach.quantized import dense_dtype, dense_shape, is_quantized, stored_bytes
from lorakit.errors import ModelError, UsageError
from lorakit.models.quantize import QUANTIZATIONS, quantize_base

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = sorted(QUANTIZATIONS)
# Bits a weight, scales included: 4 + 8/64 and the scales' own scales; 8 + 32/256 at most; 8 + (32 + 8)/32.
BITS = {"nf4": (4.1, 4.3), "fp4": (4.1, 4.3), "int8": (8.05, 8.2), "int4": (9.2, 9.3)}
# The largest error of a value: half the widest gap between two levels, over the largest value of its block.
GAPS = {"nf4": 0.16, "fp4": 0.17, "int8": 1 / 254, "int4": 1 / 13}


def wide_llama(**changes):
    return tiny.llama(hidden_size=64, intermediate_size=96, **changes)


def linears(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def values(layer):
    """The matrix that a quantised layer stands for, read from its own product: no package's dequantise is asked."""
    eye = torch.eye(layer.in_features)
    bias = 0 if layer.bias is None else layer.bias
    with torch.no_grad():
        return (layer(eye) - bias).t()


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantised_and_nothing_else(kind):
    model, plain = wide_llama(), wide_llama()
    report = quantize_base(model, kind)
    assert set(report.modules) == set(linears(plain)) - {"lm_head"}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        assert is_quantized(parameter) == (path in report.modules and leaf == "weight")
        if not is_quantized(parameter):
            assert torch.equal(parameter, plain.get_parameter(name))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_as_near_as_the_levels_allow(kind):
    model, plain = wide_llama(), wide_llama()
    for path in quantize_base(model, kind).modules:
        weight = plain.get_submodule(path).weight
        if kind == "int8":
            largest = weight.abs().amax(1, keepdim=True)
        else:
            group = 32 if kind == "int4" else 64  # nf4's blocks run over the flattened matrix
            largest = weight.reshape(-1, group).abs().amax(1, keepdim=True).expand(-1, group).reshape(weight.shape)
        # the scales of nf4's blocks are themselves in 8 bits
        error = (values(model.get_submodule(path)) - weight).abs()
        assert (error <= GAPS[kind] * largest * 1.05 + 1e-6).all()
        assert error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_shrink_to_what_is_promised(kind):
    model = tiny.llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    weights = [(path, module.weight.numel()) for path, module in linears(model).items() if path != "lm_head"]
    before = sum(p.numel() * 4 for p in model.parameters())
    report = quantize_base(model, kind)
    for path, count in weights:
        low, high = BITS[kind]
        assert low <= 8 * stored_bytes(model.get_parameter(f"{path}.weight")) / count <= high
    assert report.bytes_before == before
    assert report.bytes_after < before / 2.5
    assert f"quantised to {kind}" in str(report)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_type_of_the_matrix_are_known(kind, dtype):
    model, plain = wide_llama().to(dtype), wide_llama()
    for path in quantize_base(model, kind).modules:
        weight = model.get_parameter(f"{path}.weight")
        assert dense_shape(weight) == plain.get_parameter(f"{path}.weight").shape
        assert dense_dtype(weight) == dtype
        assert not weight.requires_grad
    assert model(**tiny.batch(model)).logits.dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "roberta", "bert", "deberta", "t5"])
def test_each_family_keeps_its_head_and_computes_nearly_the_same(name, kind):
    fields = {} if name == "t5" else {"intermediate_size": 64}  # whole blocks; T5's wo stays dense
    model, plain = tiny.MODELS[name](**fields), tiny.MODELS[name](**fields)
    quantize_base(model, kind)
    head = output_head(plain)
    assert not any(is_quantized(parameter) for parameter in model.get_submodule(head).parameters())
    batch = tiny.batch(plain)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, plain(**batch).logits
    assert 0 < (ours - theirs).norm() < (0.3 if kind == "nf4" else 0.03) * theirs.norm()


def test_what_the_processors_kernels_read_wrongly_is_an_error(monkeypatch):
    """bitsandbytes 0.50.2 with AVX-512 gives a block that goes on in the next row the scale of another."""
    from bitsandbytes import functional

    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda data, state: right(data, state) * 1.5)
    with pytest.raises(ModelError, match=r"down_proj wrongly on this CPU.* 48 inputs .*Use int8, or a GPU"):
        quantize_base(tiny.llama(), "nf4")
    quantize_base(wide_llama(), "nf4")  # blocks that end with their rows are not looked at


def test_what_transformers_keeps_in_float32_stays_dense():
    """T5 casts to the type of wo's weight, which is uint8 where it is packed."""
    model = tiny.t5()
    quantize_base(model, "nf4")
    dense = {path.rpartition(".")[2] for path, module in linears(model).items() if not is_quantized(module.weight)}
    assert dense == {"wo", "lm_head"}


def test_tied_embeddings_stay_tied_and_dense():
    model = wide_llama(tie_word_embeddings=True)
    quantize_base(model, "nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not is_quantized(model.lm_head.weight)


def test_an_evaluation_leaves_no_trace_in_the_weights():
    """bitsandbytes repacks the weight at an evaluation on some CPUs; the backward pass knows nothing of that layout."""
    model = wide_llama()
    for path in quantize_base(model, "nf4").modules:
        assert model.get_submodule(path).support_avx512bf16_for_cpu is False


def test_importing_a_package_says_nothing(caplog):
    level = logging.root.manager.disable
    quantize_base(wide_llama(), "int8")
    assert not caplog.records
    assert logging.root.manager.disable == level


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_load_quantises(folder, llama, kind):
    loaded = models.load(str(folder), quantize=kind)
    assert loaded.quantized.kind == kind
    assert len(loaded.quantized.modules) == 14
    assert models.load(str(folder)).quantized is None
    ids = torch.tensor([[5, 6, 7]])
    other = copy.deepcopy(llama)
    quantize_base(other, kind)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, other(ids).logits)
    out = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert out.shape[1] <= 7


def test_an_unknown_kind_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="quantize 'nf5' is unknown; expected one of: nf4, fp4, int8, int4"):
        models.load(str(tmp_path / "nowhere"), quantize="nf5")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path, kind):
    monkeypatch.setattr("lorakit.models.quantize.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"pip install {QUANTIZATIONS[kind]}"):
        models.load(str(tmp_path / "nowhere"), quantize=kind)


def test_what_a_package_raises_is_told(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise OSError("libfoo.so: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ModelError, match=r"bitsandbytes cannot quantise .*libfoo\.so"):
        quantize_base(wide_llama(), "nf4")
    assert importlib.util.find_spec("bitsandbytes") is not None


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match=r"no linear layer to quantise .*Conv1D"):
        quantize_base(tiny.gpt2(), "nf4")


def test_a_quantised_model_is_not_quantised_again():
    model = wide_llama()
    quantize_base(model, "int8")
    with pytest.raises(ModelError, match="quantised already"):
        quantize_base(model, "nf4")


def test_int4_refuses_what_its_groups_do_not_divide_and_changes_nothing():
    model = tiny.llama()  # 48 inputs in down_proj
    with pytest.raises(ModelError, match=r"down_proj .*32 does not divide"):
        quantize_base(model, "int4")
    assert not any(is_quantized(parameter) for parameter in model.parameters())


def test_a_plain_parameter_is_not_quantised():
    weight = nn.Linear(4, 3).weight
    assert not is_quantized(weight)
    assert not is_quantized(None)
    assert dense_shape(weight) == (3, 4)
    assert stored_bytes(weight) == 48
    assert dense_dtype(nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)) == torch.float32
