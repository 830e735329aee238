"""Adapters on layers that bitsandbytes or torchao hold quantised: forward, gradients, files, and what is refused."""

import contextlib
import copy

import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit.attach.quantized import is_quantized
from lorakit.errors import AdapterError, FileError, TargetError
from lorakit.models.quantize import quantize_base
from lorakit.store.identity import fingerprint, same_base

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

D_IN, D_OUT = 64, 48


class Lone(nn.Module):
    """One layer under a name, which matching needs."""

    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        return self.proj(x)


def linear(bias=True, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Linear(D_IN, D_OUT, bias=bias).to(dtype).requires_grad_(False)


def four_bits(quant_type, nested=True):
    def build(layer):
        made = bnb.nn.Linear4bit(
            D_IN, D_OUT, layer.bias is not None, layer.weight.dtype, compress_statistics=nested, quant_type=quant_type
        )
        made.weight = bnb.nn.Params4bit(
            layer.weight.detach(), quant_type=quant_type, compress_statistics=nested, module=made
        ).to("cpu")  # .to quantises
        made.bias = layer.bias
        return made

    return build


def eight_bits(layer):
    made = bnb.nn.Linear8bitLt(D_IN, D_OUT, layer.bias is not None, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


def ao_int8(layer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, Int8WeightOnlyConfig(set_inductor_config=False))
    return holder[0]


def ao_int4(layer):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    holder = nn.Sequential(layer)
    quantize_(holder, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return holder[0]


def ao_nf4(layer):
    from torchao.quantization import NF4Tensor

    layer.weight = nn.Parameter(NF4Tensor.from_tensor(layer.weight.detach(), 64, 48), requires_grad=False)
    return layer


LAYERS = {
    "bnb-nf4": four_bits("nf4"),
    "bnb-fp4-plain": four_bits("fp4", nested=False),
    "bnb-int8": eight_bits,
    "ao-int8": ao_int8,
    "ao-int4": ao_int4,
    "ao-nf4": ao_nf4,
}
each_layer = pytest.mark.parametrize("kind", sorted(LAYERS))
METHOD = lorakit.LoRA(r=4, alpha=6, target_modules=["proj"])


def quantized(kind, bias=True, dtype=torch.float32):
    model = Lone(LAYERS[kind](linear(bias, dtype))).train()
    assert is_quantized(model.proj.weight)
    return model


def adapted(kind, **options):
    """A quantised layer with an adapter whose B is not zero."""
    model = quantized(kind, **options)
    lorakit.attach(model, METHOD, seed=1)
    with torch.no_grad():
        model.proj.lora_Bt.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def inputs(dtype=torch.float32):
    return torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def delta(model, x):
    """The update's product in float64, from the formula."""
    A, Bt = model.proj.lora_A.double(), model.proj.lora_Bt.double()
    return (6 / 4) * x.double() @ (Bt.t() @ A).t()


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_the_quantised_bases_and_the_update(kind, dtype, bias):
    model, x = adapted(kind, bias=bias, dtype=dtype), inputs(dtype)
    base = quantized(kind, bias=bias, dtype=dtype)(x)
    expected = base.double() + delta(model, x)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            y = model(x)
        assert y.dtype == dtype
        assert torch.allclose(y.double(), expected, atol=tolerance, rtol=tolerance)
    with lorakit.use(model, None):
        assert torch.equal(model(x), base)


@each_layer
def test_a_fresh_adapter_changes_no_bit(kind):
    model, x = quantized(kind), inputs()
    before = model(x)
    lorakit.attach(model, METHOD)
    assert torch.equal(model(x), before)


@each_layer
def test_gradients_reach_the_pair_and_the_input_and_nothing_else(kind):
    model, x = adapted(kind), inputs().requires_grad_()
    weight = inputs()[..., :D_OUT]
    (model(x) * weight).sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == {"proj.lora_A", "proj.lora_Bt"}
    A, Bt = model.proj.lora_A.detach().double(), model.proj.lora_Bt.detach().double()
    flat, g = x.detach().double().reshape(-1, D_IN), weight.double().reshape(-1, D_OUT)
    assert torch.allclose(model.proj.lora_A.grad.double(), 1.5 * Bt @ g.t() @ flat, atol=1e-4)
    assert torch.allclose(model.proj.lora_Bt.grad.double(), 1.5 * A @ flat.t() @ g, atol=1e-4)
    # the input's gradient: the base's own, and the update's
    alone = inputs().requires_grad_()
    (quantized(kind)(alone) * weight).sum().backward()
    expected = alone.grad.double().reshape(-1, D_IN) + 1.5 * g @ Bt.t() @ A
    assert torch.allclose(x.grad.double().reshape(-1, D_IN), expected, atol=1e-4)


@each_layer
def test_the_adapter_has_the_type_that_the_weight_had(kind):
    model = adapted(kind, dtype=torch.bfloat16)
    known = kind != "bnb-int8"  # int8 weights do not say what they were made from
    assert model.proj.lora_A.dtype == (torch.bfloat16 if known else torch.float32)
    assert model.proj.lora_A.shape == (4, D_IN)
    assert model.proj.lora_Bt.shape == (4, D_OUT)
    lorakit.attach(model, METHOD, name="wide", dtype=torch.float32)
    assert model.proj.lora_A.dtype == torch.float32


@each_layer
def test_parameters_are_counted_as_of_the_matrix(kind):
    report = lorakit.attach(quantized(kind), METHOD)
    assert report.trainable == 4 * (D_IN + D_OUT)
    assert report.total == report.trainable + D_IN * D_OUT + D_OUT


@each_layer
def test_detach_leaves_the_layer_as_it_was(kind):
    model, x = quantized(kind), inputs()
    kept = {name: value.clone() for name, value in model.proj.state_dict().items() if type(value) is torch.Tensor}
    layer, weight = type(model.proj), model.proj.weight
    names = list(model.proj.state_dict())
    before = model(x)
    lorakit.attach(model, METHOD)
    model(x).sum().backward()
    lorakit.detach(model, "default")
    assert type(model.proj) is layer
    assert model.proj.weight is weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(x), before)
    now = model.proj.state_dict()
    assert list(now) == names
    assert all(torch.equal(now[name], value) for name, value in kept.items())


@each_layer
def test_merging_is_refused_and_changes_nothing(kind):
    model, x = adapted(kind), inputs()
    before = model(x)
    with pytest.raises(AdapterError, match=r"quantised.*Load the base unquantised"):
        lorakit.merge(model, "default")
    assert torch.equal(model(x), before)
    with pytest.raises(AdapterError, match="quantised"):
        lorakit.merge(model, "default", keep=False)
    assert list(lorakit.adapters(model)) == ["default"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_quantised_cannot_be_trained_in_full(kind):
    model = small(kind)
    with pytest.raises(TargetError, match=r"down_proj\.weight is quantised.*modules_to_save"):
        lorakit.attach(model, lorakit.LoRA(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    assert lorakit.adapters(model) == {}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rows_of_one_batch_take_different_adapters(kind):
    model = small(kind)
    for number, name in enumerate(("one", "two")):
        attach_random(model, name, seed=number)
    batch = tiny.batch(model)
    with torch.no_grad():
        with lorakit.route(model, ["one", None, "two"]):
            together = model(**batch).logits
        for row, name in enumerate(("one", None, "two")):
            with lorakit.use(model, name):
                alone = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits
            assert torch.allclose(together[row : row + 1], alone, atol=2e-4)


def small(kind=None):
    model = tiny.llama(hidden_size=64, intermediate_size=96).requires_grad_(False)
    if kind is not None:
        quantize_base(model, kind)
    return model


def attach_random(model, name="default", seed=0, **options):
    lorakit.attach(model, lorakit.LoRA(r=4, **options), name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lorakit.parameters(model, name):
            parameter.normal_(std=0.05, generator=generator)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(kind):
    model = small(kind)
    before = copy.deepcopy(dict(model.state_dict()))
    lorakit.attach(model, lorakit.LoRA(r=8), seed=0)
    batch = tiny.batch(model, rows=4, labels=True)
    optimizer = torch.optim.AdamW(lorakit.parameters(model, "default"), lr=1e-2)
    losses = []
    for _ in range(12):
        model.eval()  # measured in between, as a run does
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
        model.train()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    lorakit.detach(model, "default")
    for name, value in model.state_dict().items():
        if type(value) is torch.Tensor:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_a_saved_adapter_comes_back_bit_for_bit_on_either_base(kind, tmp_path):
    model = small(kind)
    attach_random(model)
    saved = [parameter.detach().clone() for parameter in lorakit.parameters(model, "default")]
    batch = tiny.batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
    lorakit.save(model, tmp_path / "adapter")
    for base in (small(kind), small()):
        lorakit.load(base, tmp_path / "adapter", trainable=True)
        assert all(torch.equal(own, kept) for own, kept in zip(lorakit.parameters(base, "default"), saved, strict=True))
    again = small(kind)
    lorakit.load(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)


def test_an_adapter_of_the_plain_base_loads_on_the_quantised_and_merges_on_the_plain(tmp_path):
    plain = small()
    attach_random(plain)
    lorakit.save(plain, tmp_path / "adapter")
    model = small("nf4")
    lorakit.load(model, tmp_path / "adapter")
    attach_random(model, "other", seed=5)
    lorakit.save(model, tmp_path / "other", name="other")
    lorakit.load(plain, tmp_path / "other", name="other")
    assert lorakit.merge(plain, "other", probe=tiny.batch(plain)).max_logit_difference < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_another_base_is_still_told(kind, tmp_path):
    model = small(kind)
    attach_random(model)
    lorakit.save(model, tmp_path / "adapter")
    for changes in ({"vocab_size": 97}, {"rms_norm_eps": 1e-6, "num_hidden_layers": 3}):
        other = tiny.llama(**({"hidden_size": 64, "intermediate_size": 96} | changes))
        quantize_base(other, kind)
        with pytest.raises(FileError, match="another base"):
            lorakit.load(other, tmp_path / "adapter")
    moved = small(kind)
    with torch.no_grad():
        moved.model.embed_tokens.weight.add_(1.0)  # the same shapes; what is not quantised still tells
    with pytest.raises(FileError, match="another base"):
        lorakit.load(moved, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_the_fingerprint_knows_a_base_quantised_or_not(kind):
    plain, quantised = fingerprint(small()), fingerprint(small(kind))
    assert plain != quantised
    assert same_base(plain, quantised)
    assert same_base(quantised, plain)
    assert same_base(fingerprint(small("nf4")), fingerprint(small("int8")))
    assert same_base(fingerprint(small(kind).to(torch.bfloat16)), plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_copy_carries_its_adapter(kind):
    model = small(kind)
    attach_random(model)
    twin, batch = copy.deepcopy(model), tiny.batch(model)
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4"])
def test_peft_on_the_same_quantised_model_gives_the_same(kind, tmp_path):
    peft = pytest.importorskip("peft")
    ours = small(kind)
    attach_random(ours)
    lorakit.save(ours, tmp_path / "adapter")
    base = small(kind)
    # what transformers notes on a model that it loads in 4 bits, and PEFT looks at
    base.is_loaded_in_4bit = kind in ("nf4", "fp4")
    with (
        pytest.warns(UserWarning, match="get_apply_tensor_subclass")
        if kind.startswith("int")
        else contextlib.nullcontext()
    ):
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batch = tiny.batch(ours)
    with torch.no_grad():
        assert torch.allclose(ours(**batch).logits, theirs(**batch).logits, atol=1e-5)
        assert not torch.allclose(ours(**batch).logits, small(kind)(**batch).logits, atol=1e-2)
