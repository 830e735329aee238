"""lorakit and PEFT on modules of every layer kind: the same weights give the same outputs in every state, each reads the
other's folder, and training ends in the same parameters."""

import warnings
from pathlib import Path
from typing import Any

import custom_cases
import pytest
import torch
from custom_cases import CASES, GROUPED, Case, batch
from parity_cases import peft_load, plain_config, randomise, stored
from torch import Tensor

import lorakit as lk

CLOSE = {"atol": 1e-10, "rtol": 1e-10}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:the rank is larger than the smaller side:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape:UserWarning"),  # PEFT, of lora_bias
    # PEFT says that a whole embedding is stored where one is adapted
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def theirs_of(case: Case) -> Any:
    """PEFT's model with random values in everything that it trains."""
    from peft import get_peft_model

    model = get_peft_model(case.base(), case.config())
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    return corrected(model.eval())


def corrected(model: Any) -> Any:
    """PEFT 0.21 adds the update of an attention layer's output projection twice, merged and unmerged (its pull request
    3774): here its second merge is taken out."""
    from peft.tuners.lora.layer import MultiheadAttention

    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.base_layer.out_proj.merge = lambda **_: None
            module.base_layer.out_proj.unmerge = lambda: None
    return model


def ours_of(case: Case) -> Any:
    model = case.base()
    lk.attach(model, case.method())
    randomise(lk.parameters(model, "default"))
    return model


@torch.no_grad()
def outputs(model: Any, seed: int = 5) -> Tensor:
    return model(batch(model, seed))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def all_states(ours: Any, theirs: Any, case: Case) -> None:
    """Unmerged, merged, unmerged again, disabled: equal outputs, ours bit for bit what they were."""
    before, base = outputs(ours), outputs_of_base(ours)
    assert torch.equal(base, outputs(case.base().requires_grad_(False)))  # frozen: attention rounds otherwise else
    same(before, outputs(theirs))
    assert (before - base).abs().max() > 1e-3  # the adapter does something
    lk.merge(ours, "default")
    same(outputs(ours), before)
    if case.model != "conv3d-1x1":  # which PEFT takes for a Conv2d's kernel, and raises
        theirs.merge_adapter()
        same(outputs(ours), outputs(theirs))
        theirs.unmerge_adapter()
    lk.unmerge(ours)
    assert torch.equal(outputs(ours), before)
    same(outputs(ours), outputs(theirs))
    if case.fields.get("bias", "none") == "none":  # PEFT trains the base's own biases: they stay when it is disabled
        with theirs.disable_adapter():
            same(base, outputs(theirs))
    assert torch.equal(outputs(ours), before)


def outputs_of_base(model: Any) -> Tensor:
    with lk.use(model, None):
        return outputs(model)


@every_case
def test_lorakit_loads_what_peft_saves_computes_the_same_and_saves_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "peft")
    ours = case.base()
    lk.load(ours, tmp_path / "peft")
    all_states(ours, theirs, case)

    lk.save(ours, tmp_path / "ours")
    before, config = stored(tmp_path / "peft")
    after, written = stored(tmp_path / "ours")
    assert set(after) == {key for key in before if not key.endswith(".base_layer.weight")}
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in after)
    assert plain_config(written) == plain_config(config)


@every_case
def test_peft_loads_what_lorakit_saves_and_computes_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours = ours_of(case)
    lk.save(ours, tmp_path)
    theirs = corrected(peft_load(case, tmp_path))
    all_states(ours, theirs, case)
    again = case.base()
    lk.load(again, tmp_path)
    assert torch.equal(outputs(again), outputs(ours))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fields.get("dropout")])
def test_three_steps_of_training_end_in_the_same_parameters(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "start")
    ours = case.base()
    lk.load(ours, tmp_path / "start", trainable=True)
    wanted = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    trained = lk.parameters(ours, "default")
    assert sum(p.numel() for p in wanted) == sum(p.numel() for p in trained)
    for model, parameters in ((theirs, wanted), (ours, trained)):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        model.train()
        for step in range(3):
            optimizer.zero_grad()
            (model(batch(model, step)) - 0.3).square().mean().backward()
            optimizer.step()
    theirs.save_pretrained(tmp_path / "peft")
    lk.save(ours, tmp_path / "ours")
    start, _ = stored(tmp_path / "start")
    expected, _ = stored(tmp_path / "peft")
    found, _ = stored(tmp_path / "ours")
    assert max(float((found[key] - start[key]).abs().max()) for key in found) > 1e-3
    for key, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[key], atol=1e-7, rtol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", GROUPED)
def test_a_grouped_convolution_is_the_same_in_peft_and_merges_here(name: str, tmp_path: Path) -> None:
    """PEFT raises on merging it; here the merged weight is the layer's own shape, checked against the unmerged outputs."""
    case = GROUPED[name]
    ours = ours_of(case)
    before = outputs(ours)
    lk.save(ours, tmp_path / "ours")
    theirs = peft_load(case, tmp_path / "ours")
    same(outputs(theirs), before)
    lk.merge(ours, "default")
    same(outputs(ours), before)
    with pytest.raises(NotImplementedError):
        theirs.merge_adapter()
    again = case.base()
    lk.load(again, tmp_path / "ours")
    assert torch.equal(outputs(again), before)
    lk.merge(again, "default")  # the zeros that PEFT's shape wants are recognised, and left out again


@pytest.mark.parametrize("name", GROUPED)
def test_petfs_dense_a_on_a_grouped_convolution_is_used_as_it_is_and_refuses_to_merge(
    name: str, tmp_path: Path
) -> None:
    case = GROUPED[name]
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "peft")
    ours = case.base()
    lk.load(ours, tmp_path / "peft")
    same(outputs(ours), outputs(theirs))
    with pytest.raises(lk.errors.AdapterError, match="reaches across"):
        lk.merge(ours, "default")
    same(outputs(ours), outputs(theirs))
    lk.save(ours, tmp_path / "ours")
    before, _ = stored(tmp_path / "peft")
    after, _ = stored(tmp_path / "ours")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_table_has_the_forty_configurations() -> None:
    assert len(CASES) + len(GROUPED) >= 40
    assert {case.model for case in (*CASES.values(), *GROUPED.values())} <= set(custom_cases.NETS)
    with warnings.catch_warnings(record=True):
        assert all(case.config().peft_type for case in CASES.values())
