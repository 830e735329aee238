"""Root-mean-square norms in one node: the same numbers, chosen only where they are, given back on detach."""

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import lorakit as lk
from lorakit.attach.norm import known
from lorakit.core import kernels
from lorakit.core.norm import RootMeanSquareNorm


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (1, 1, 16)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_it_is_the_layer_s_own_in_value_and_gradient(shape, size):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5)
    norm.weight = nn.Parameter(torch.randn(shape[-1]), requires_grad=False)
    x = (torch.randn(shape) * size).requires_grad_()
    dy, exact = torch.randn(shape), x.detach().double().requires_grad_()
    y = RootMeanSquareNorm.apply(x, norm.weight, norm.variance_epsilon)
    y.backward(dy)
    r = (exact.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    (exact * r * norm.weight.double()).backward(dy.double())
    assert torch.equal(y, norm(x))
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=2e-6 * float(exact.grad.abs().max()))


def test_only_the_known_form_is_taken():
    assert known(LlamaRMSNorm)
    assert not any(known(one) for one in (T5LayerNorm, nn.LayerNorm, nn.Linear))

    class Bent(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    assert not known(Bent)


def test_a_step_is_the_reference_s_and_detach_gives_the_class_back(monkeypatch):
    model = tiny.llama().train()
    classes = {path: type(module) for path, module in model.named_modules()}
    ids = torch.randint(1, 60, (2, 9))
    lk.attach(model, lk.LoRA(r=2), name="a", seed=0)
    with torch.no_grad():
        for parameter in lk.parameters(model, "a"):
            parameter.normal_(std=0.1)
    twin = copy.deepcopy(model)
    norm = model.model.layers[0].input_layernorm
    assert type(norm).forward is not LlamaRMSNorm.forward
    assert isinstance(norm, LlamaRMSNorm)
    assert type(pickle.loads(pickle.dumps(norm))) is type(norm)
    model(ids).logits.pow(2).mean().backward()
    monkeypatch.setattr(kernels, "fused", False)
    twin(ids).logits.pow(2).mean().backward()
    for mine, other in zip(lk.parameters(model, "a"), lk.parameters(twin, "a"), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))
    lk.detach(model, "a")
    assert {path: type(module) for path, module in model.named_modules()} == classes


def test_a_norm_that_is_trained_runs_its_own_forward_and_gets_its_gradient():
    model = tiny.llama().train()
    lk.attach(model, lk.LoRA(r=2, modules_to_save=["input_layernorm"]), name="a", seed=0)
    model(torch.randint(1, 60, (2, 9))).logits.pow(2).mean().backward()
    assert model.model.layers[1].input_layernorm.lora_weight.grad.abs().max() > 0
