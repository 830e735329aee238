"""Training steps equal those of a brute-force model with explicit W + s B A, written with parametrizations of torch."""

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.core.dropout import keep_mask


class Explicit(nn.Module):
    """W + scale * B A in the weight's own layout, as a parametrization: torch's autograd does the rest."""

    def __init__(self, A, Bt, scale, layout):
        super().__init__()
        self.A, self.Bt = nn.Parameter(A.detach().clone()), nn.Parameter(Bt.detach().clone())
        self.scale, self.layout = scale, layout

    def forward(self, weight):
        delta = {
            "linear": lambda: self.Bt.T @ self.A,
            "conv": lambda: self.A.T @ self.Bt,
            "table": lambda: self.A @ self.Bt,
        }
        return weight + self.scale * delta[self.layout]()


def reference(kind, model, name):
    """(the brute-force model, its parameters in the order of the adapter's)."""
    plain = tiny.MODELS[kind]().double().requires_grad_(False)
    draft, parameters = adapting.host(model).records[name].draft, []
    for path, pair in draft.pairs.items():
        leaf = plain.get_submodule(path)
        layout = "table" if isinstance(leaf, nn.Embedding) else "conv" if type(leaf).__name__ == "Conv1D" else "linear"
        explicit = Explicit(pair.A, pair.Bt, pair.scale, layout)
        torch.nn.utils.parametrize.register_parametrization(leaf, "weight", explicit)
        parameters += [explicit.A, explicit.Bt]
    for path, group in draft.replaced.items():
        for own in group:
            holder = plain.get_submodule(path)
            if torch.nn.utils.parametrize.is_parametrized(holder) and own == "weight":
                raise ValueError(path)
            parameters.append(holder._parameters[own].requires_grad_(True))
    return plain, parameters


def steps(model, parameters, count=4):
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01), []
    for _ in range(count):
        loss = model(**tiny.batch(model, labels=True)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "bias": "all"}, {"bias": "lora_only"}, {"head": True}])
@pytest.mark.parametrize("kind", adapting.FIVE)
def test_steps_equal_the_brute_force_models(kind, fields):
    fields = dict(fields)
    if fields.pop("head", False):
        fields["modules_to_save"] = [adapting.HEADS[kind]]
    model = tiny.MODELS[kind]().double()
    lk.attach(model, lk.LoRA(r=3, alpha=6, **fields), name="a", seed=1)
    plain, parameters = reference(kind, model, "a")
    ours = lk.parameters(model, "a")
    assert [p.shape for p in ours] == [p.shape for p in parameters]
    base = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
    losses = steps(model, ours)
    torch.testing.assert_close(losses, steps(plain, parameters), rtol=1e-9, atol=0)
    assert losses[-1] < losses[0]
    for p, q in zip(ours, parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_embeddings_train_like_the_brute_force_models(kind):
    model = tiny.MODELS[kind]().double()
    lk.attach(model, lk.LoRA(r=3, target_modules=[adapting.EMBEDDINGS[kind]]), name="a", seed=1)
    plain, parameters = reference(kind, model, "a")
    torch.testing.assert_close(steps(model, lk.parameters(model, "a")), steps(plain, parameters), rtol=1e-9, atol=0)


def test_dropout_drops_the_updates_input_in_training_only():
    torch.manual_seed(0)
    layer = nn.Linear(50, 40)
    model = nn.Sequential(layer)
    lk.attach(model, lk.LoRA(r=4, dropout=0.4), name="a")
    adapting.grow(model, "a")
    pair, x = adapting.host(model).records["a"].draft.pairs["0"], torch.randn(6, 50)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            torch.manual_seed(3)
            found = model.train()(x)
            torch.manual_seed(3)
            keep, factor = keep_mask(x, 0.4)
            assert not keep.all()
            dropped = x * keep * factor
            expected = nn.functional.linear(x, layer.weight, layer.bias) + pair.scale * (dropped @ pair.A.T) @ pair.Bt
            torch.testing.assert_close(found, expected)
            plain = nn.functional.linear(x, layer.weight, layer.bias) + pair.scale * (x @ pair.A.T) @ pair.Bt
            torch.testing.assert_close(model.eval()(x), plain)


def test_autocast_computes_in_the_lower_type_and_keeps_fp32_gradients():
    model = adapting.attached("llama", "a")
    exact = model(**tiny.batch(model, labels=True)).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny.batch(model, labels=True)).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), exact, rtol=0.03, atol=0)
    assert {p.grad.dtype for p in lk.parameters(model, "a")} == {torch.float32}
