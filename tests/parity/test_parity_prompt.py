"""lorakit and PEFT 0.21 read each other's folders of prompt tuning, P-tuning and prefix tuning, and compute the same."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt import Prompt
from lorakit.methods.prompt_tuning import PromptTuning

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
FAMILIES = {
    "gpt2": partial(tiny.gpt2, initializer_range=0.3),
    "llama": partial(tiny.llama, initializer_range=0.3),
    "bert": tiny.bert,
    "roberta": tiny.roberta,
}
METHODS = {
    "prompt": PromptTuning(4),
    "p-lstm": PTuning(4, hidden=8),
    "p-mlp": PTuning(4, "mlp", hidden=8),
    "prefix": PrefixTuning(4),
    "prefix-mlp": PrefixTuning(4, reparametrise=True, hidden=8),
}
PEFT = {
    "prompt": ("PromptTuningConfig", {}),
    "p-lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-mlp": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}),
}
every = [pytest.mark.parametrize("family", FAMILIES), pytest.mark.parametrize("kind", METHODS)]
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def classifies(family: str) -> bool:
    return family in ("bert", "roberta")


def peft_model(family: str, kind: str) -> Any:
    import peft

    name, more = PEFT[kind]
    task = "SEQ_CLS" if classifies(family) else "CAUSAL_LM"
    torch.manual_seed(3)
    model = peft.get_peft_model(FAMILIES[family](), getattr(peft, name)(task_type=task, num_virtual_tokens=4, **more))
    for part, parameter in model.named_parameters():
        if "classifier" in part and "modules_to_save" in part:
            with torch.no_grad():
                parameter.add_(0.1)
    return model.eval()


def ours(family: str, kind: str) -> nn.Module:
    from dataclasses import replace

    model = FAMILIES[family]()
    method = replace(METHODS[kind], modules_to_save=["classifier"]) if classifies(family) else METHODS[kind]
    lk.attach(model, method, seed=5)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    batch = tiny.batch(FAMILIES[family]())
    found: Tensor = model(**batch).logits
    return found[:, -7:] if found.dim() == 3 else found  # PEFT's prompts give the virtual tokens' logits too


def answer(model: Any) -> Tensor:
    x = tiny.batch(FAMILIES["gpt2"]())["input_ids"]
    out: Tensor = model.generate(
        input_ids=x,
        attention_mask=torch.ones_like(x),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, x.shape[1] :]


def same(mine: Any, theirs: Any, family: str, base: Tensor) -> None:
    expected = logits(theirs, family)
    torch.testing.assert_close(logits(mine, family), expected, **CLOSE)
    assert (expected - base).abs().max() > 1e-4
    if not classifies(family):
        assert torch.equal(answer(mine), answer(theirs))


@every[0]
@every[1]
def test_peft_loads_what_lorakit_saves(family: str, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    mine = ours(family, kind)
    lk.save(mine, tmp_path)
    base = logits(FAMILIES[family](), family)
    theirs = PeftModel.from_pretrained(FAMILIES[family](), tmp_path).eval()
    same(mine, theirs, family, base)


@every[0]
@every[1]
def test_lorakit_loads_what_peft_saves_and_saves_the_same(family: str, kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    theirs = peft_model(family, kind)
    theirs.save_pretrained(tmp_path / "peft")
    mine = FAMILIES[family]()
    lk.load(mine, tmp_path / "peft")
    same(mine, theirs, family, logits(FAMILIES[family](), family))
    lk.save(mine, tmp_path / "ours")
    before, after = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("peft", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    first, again = (json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("peft", "ours"))
    assert first == again


@every[0]
@every[1]
def test_a_folder_gives_the_adapter_back_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    mine = ours(family, kind)
    lk.save(mine, tmp_path, notes={"metrics": {"loss": 1.5}})
    again = FAMILIES[family]()
    lk.load(again, tmp_path, name="again", trainable=True)
    torch.testing.assert_close(logits(again, family), logits(mine, family), rtol=0, atol=1e-6)
    assert lk.verify(tmp_path, FAMILIES[family]()).ok
    told = lk.inspect(tmp_path)
    assert not told.faults
    assert told.identity is not None
    lk.save(again, tmp_path / "2", name="again")
    assert (tmp_path / "2" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()
    assert lk.inspect(tmp_path / "2").identity == told.identity


@pytest.mark.parametrize("kind", ["p-lstm", "p-mlp"])
def test_the_prompt_encoder_is_pefts(kind: str) -> None:
    theirs = peft_model("gpt2", kind).prompt_encoder["default"]
    model = FAMILIES["gpt2"]()
    lk.attach(model, METHODS[kind])
    from lorakit.attach.host import host_of

    insert = host_of(model).records["default"].draft.inserts["transformer"]["prompt"]
    state = theirs.state_dict()
    mine = {}
    for name, tensor in state.items():
        room, _, rest = name.partition(".")
        if room == "embedding":
            mine["vectors"] = tensor
        elif room == "lstm_head":
            mine[rest] = tensor
        else:
            number, part = rest.split(".")
            mine[f"linear{int(number) // 2}_{part}"] = tensor
    assert {name: one.shape for name, one in mine.items()} == {name: one.shape for name, one in insert.tensors.items()}
    operation = insert.operation
    assert isinstance(operation, Prompt)
    with torch.no_grad():
        expected = theirs(torch.arange(4)[None])[0]
        torch.testing.assert_close(operation.vectors(None, mine)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projected", [False, True])
def test_the_reparametrised_prefix_is_pefts(projected: bool) -> None:
    """The same MLP gives the same layers' keys and values: its second half is cut into the layers' rows."""
    from lorakit.attach.host import host_of
    from lorakit.store.peft_prompt import result

    theirs = peft_model("llama", "prefix-mlp" if projected else "prefix").prompt_encoder["default"]
    model = FAMILIES["llama"]()
    lk.attach(model, METHODS["prefix-mlp" if projected else "prefix"])
    draft = host_of(model).records["default"].draft
    groups = [group["prefix"].tensors for group in draft.inserts.values() if "prefix" in group]
    if projected:
        first, last = theirs.transform[0], theirs.transform[2]
        weights, biases = last.weight.chunk(len(groups)), last.bias.chunk(len(groups))
        for number, group in enumerate(groups):
            group |= {
                "vectors": theirs.embedding.weight, "first_weight": first.weight, "first_bias": first.bias,
                "second_weight": weights[number], "second_bias": biases[number],
            }  # fmt: skip
    else:
        parts = iter(theirs.embedding.weight.chunk(2 * len(groups), 1))
        for group in groups:
            group |= {"keys": next(parts), "values": next(parts)}
    with torch.no_grad():
        torch.testing.assert_close(result(draft, model), theirs(torch.arange(4)[None])[0], rtol=1e-5, atol=1e-6)
