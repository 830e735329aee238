"""What holds for every method: a fresh one changes nothing, off, weighed, by rows, checkpointed, generated with, detached."""

import copy

import method_kit as kit
import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterError, TargetError, UsageError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.houlsby import HoulsbyAdapter


def attached(family: str, name: str) -> nn.Module:
    model = kit.FAMILIES[family]()
    lk.attach(model, kit.METHODS[name], name="a", seed=0)
    return model


@pytest.mark.parametrize(("family", "name"), kit.CASES)
def test_on_off_and_detached(family: str, name: str) -> None:
    plain = kit.FAMILIES[family]()
    batch, classes = tiny.batch(plain), {path: type(module) for path, module in plain.named_modules()}
    base = kit.logits(plain, **batch)
    model = attached(family, name)
    assert torch.equal(kit.logits(model, **batch), base)
    on = kit.logits(kit.shaken(model), **batch)
    assert not torch.allclose(on, base, atol=1e-4)
    with lk.use(model, None):
        assert torch.equal(kit.logits(model, **batch), base)
    with lk.use(model, {"a": 0.0}):
        torch.testing.assert_close(kit.logits(model, **batch), base, rtol=0, atol=1e-6)
    with lk.use(model, {"a": 0.5}):
        half = kit.logits(model, **batch)
        assert not torch.allclose(half, base, atol=1e-5)
        assert not torch.allclose(half, on, atol=1e-5)
    copied = copy.deepcopy(model)
    assert torch.equal(kit.logits(copied, **batch), on)
    lk.detach(model, "a")
    assert torch.equal(kit.logits(model, **batch), base)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", kit.ADAPTERS)
@pytest.mark.parametrize("family", kit.FAMILIES)
def test_rows_of_one_batch_take_different_adapters(family: str, name: str) -> None:
    model = attached(family, name)
    lk.attach(model, kit.METHODS[name], name="b", seed=1)
    batch = tiny.batch(model)
    alone = {None: kit.logits(_using(model, None), **batch)}
    for seed, one in enumerate(("a", "b")):
        kit.shaken(model, one, seed)
        alone[one] = kit.logits(_using(model, one), **batch)
    rows = ["b", None, "a"]
    with lk.route(model, rows):
        mixed = kit.logits(model, **batch)
    wanted = torch.stack([alone[one][i] for i, one in enumerate(rows)])
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=2e-6)


def test_parameters_that_are_read_for_all_rows_at_once_are_refused_by_rows() -> None:
    model = attached("llama", "full")
    with (
        lk.route(model, ["a", None, "a"]),
        pytest.raises(AdapterError, match="rows of one batch cannot take different"),
    ):
        kit.logits(model, **tiny.batch(model))


def test_positions_that_are_made_of_the_whole_mask_are_refused_by_rows() -> None:
    model = tiny.opt()  # whose embed_positions takes a mask, counts it, and takes more besides
    lk.attach(model, kit.METHODS["full"], name="a")
    with lk.route(model, ["a", None, "a"]), pytest.raises(AdapterError, match=r"embed_positions.*more than its input"):
        kit.logits(model, **tiny.batch(model))
    top = kit.METHODS["top"]
    lk.attach(model, top, name="b")  # leaves them as they are
    with lk.route(model, ["b", None, "b"]):
        assert kit.logits(model, **tiny.batch(model)).shape[0] == 3


def _using(model: nn.Module, name: str | None) -> nn.Module:
    lk.use(model, name)
    return model


@pytest.mark.parametrize("name", kit.METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generates_with_the_cache_as_without(family: str, name: str) -> None:
    if (family, name) not in kit.CASES:
        pytest.skip("Llama has no biases")
    model = kit.shaken(attached(family, name))
    batch = tiny.batch(model)
    answers = [
        model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None)
        for cached in (True, False)
    ]
    assert torch.equal(*answers)
    with lk.use(model, None):
        base = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert base.shape == answers[0].shape == (3, 15)


@pytest.mark.parametrize(("family", "name"), [case for case in kit.CASES if case[0] in ("roberta", "llama")])
def test_checkpointing_gives_the_same_gradients(family: str, name: str) -> None:
    model = kit.shaken(attached(family, name)).train()
    batch = tiny.batch(model, labels=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "attention_probs_dropout_prob"):
        if key in model.config.to_dict():
            setattr(model.config, key, 0.0)
    grads: list[list[Tensor]] = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).loss.backward()
        found = [parameter.grad for parameter in lk.parameters(model, "a") if parameter.grad is not None]
        grads.append([one.clone() for one in found])
    assert grads[0]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("family", "name"), [case for case in kit.CASES if case[1] in kit.COPIES])
def test_copies_stand_for_the_bases_own_parameters(family: str, name: str) -> None:
    """Outputs and gradients of a plain model whose parameters were changed alike."""
    twin = kit.FAMILIES[family]()
    model = kit.shaken(attached(family, name))
    with lk.use(model, None):
        names = {id(parameter): full for full, parameter in model.named_parameters()}
    own = {}
    for module in model.modules():
        for key, tensor in module._parameters.items():
            if key.startswith("lora_") and tensor is not None:
                base = module._parameters[key.removeprefix("lora_")]
                own[names[id(base)]] = tensor
    assert len(own) == len(lk.parameters(model, "a"))
    mine = dict(twin.named_parameters())
    with torch.no_grad():
        for full, tensor in own.items():
            mine[full].copy_(tensor)
    batch = tiny.batch(model, labels=True)
    for one in (model, twin):
        one(**batch).loss.backward()
    torch.testing.assert_close(kit.logits(model, **batch), kit.logits(twin, **batch), rtol=0, atol=1e-6)
    for full, tensor in own.items():
        if mine[full].grad is not None:
            torch.testing.assert_close(tensor.grad, mine[full].grad, rtol=1e-4, atol=1e-7)


def test_tied_weights_stay_one() -> None:
    model = tiny.gpt2()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert lk.attach(model, FullFineTuning(), name="a").trainable == total
    ids = {id(parameter) for parameter in lk.parameters(model, "a")}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert id(model.lm_head.weight) in ids
    lk.detach(model, "a")
    lk.attach(model, FullFineTuning(top_layers=1, modules_to_save=["lm_head"]), name="b")
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_merging_copies_and_taking_them_back() -> None:
    model = kit.shaken(attached("gpt2", "bitfit"))
    batch = tiny.batch(model)
    on = kit.logits(model, **batch)
    with lk.use(model, None):
        base = kit.logits(model, **batch)
    lk.merge(model, "a")
    torch.testing.assert_close(kit.logits(model, **batch), on)
    lk.unmerge(model)
    with lk.use(model, None):
        assert torch.equal(kit.logits(model, **batch), base)


def test_heads_are_trained_beside_every_method() -> None:
    for name, method in kit.METHODS.items():
        model = tiny.roberta()
        head = {f"classifier.{key}" for key, _ in model.classifier.named_parameters()}
        cls = type(method)
        lk.attach(model, cls(modules_to_save=["classifier"]), name="a", seed=0)
        before = model.classifier.out_proj.weight
        assert any(before is parameter for parameter in lk.parameters(model, "a")), name
        lk.use(model, None)
        assert {key for key in model.state_dict() if key.startswith("classifier")} == head


def test_models_without_a_place_are_refused_as_they_were() -> None:
    for model, method, said in (
        (tiny.llama(), BitFit(), "has no biases"),
        (tiny.llama(), BitFit(modules_to_save=["lm_head"]), "has no biases"),
        (tiny.gpt2(), FullFineTuning(top_layers=3), "has 2 blocks"),
        (tiny.t5(), FullFineTuning(top_layers=1), "no single list of blocks"),
        (nn.LSTM(3, 3), FullFineTuning(), "reads its parameters past their names"),
        (nn.LSTM(3, 3), BitFit(), "reads its parameters past their names"),
        (nn.ReLU(), FullFineTuning(), "no parameters"),
    ):
        with pytest.raises(TargetError, match=said):
            lk.attach(model, method)
        assert "_lorakit" not in model.__dict__
    with pytest.raises(UsageError, match="top_layers must be"):
        FullFineTuning(top_layers=0)


def test_full_fine_tuning_works_on_any_module() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.randn(4, 2, 4, 4)
    base = model(x).detach()
    lk.attach(model, FullFineTuning(), name="a")
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lk.parameters(model, "a"))
    kit.shaken(model)
    assert not torch.allclose(model(x), base)
    lk.detach(model, "a")
    assert torch.equal(model(x), base)


def test_combined_with_lora() -> None:
    model = tiny.roberta()
    batch = tiny.batch(model)
    base = kit.logits(model, **batch)
    lk.attach(model, [lk.LoRA(r=2), HoulsbyAdapter(r=2), BitFit(modules_to_save=["classifier"])], name="a", seed=0)
    assert torch.equal(kit.logits(model, **batch), base)
    counts = lk.count_parameters(model)
    assert min(counts.low_rank, counts.inserted, counts.replaced) > 0
    assert counts.trainable == counts.low_rank + counts.inserted + counts.replaced
