"""lorakit and PEFT 0.21 read each other's folders and compute the same, before and after merging and in training."""

import json
import os

import pytest
import tiny
import torch
from parity_cases import CASES, logits, lorakit_model, peft_load, peft_model, plain_config, stored

import lorakit as lk

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# What PEFT itself says about adapters on embeddings, whoever wrote them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning"),
]
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """PEFT asks the hub for a base's config where a base has a name; these have none, and need no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@every_case
def test_peft_loads_what_lorakit_saves_and_both_merge_to_the_same(name, tmp_path):
    case = CASES[name]
    ours = lorakit_model(case)
    expected = logits(ours)
    assert (expected - logits(case.base())).abs().max() > 1e-4  # the adapter does something
    lk.save(ours, tmp_path)
    theirs = peft_load(case, tmp_path)
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    lk.merge(ours, "default")
    if name == "embedding-tied":  # PEFT merges into both of the tied weights, which changes its logits
        torch.testing.assert_close(logits(ours), expected, **CLOSE)
        return
    torch.testing.assert_close(logits(ours), logits(theirs.merge_and_unload()), **CLOSE)


@every_case
def test_lorakit_loads_what_peft_saves_and_saves_the_same(name, tmp_path):
    case = CASES[name]
    theirs = peft_model(case)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    ours = case.base()
    lk.load(ours, tmp_path / "peft")
    torch.testing.assert_close(logits(ours), expected, **CLOSE)

    lk.save(ours, tmp_path / "ours")
    before, config = stored(tmp_path / "peft")
    after, written = stored(tmp_path / "ours")
    copies = (
        ".base_layer.weight",
        ".original_module.",
        ".modules_to_save.",
    )  # PEFT's, of the base and, twice, of heads
    assert set(after) == {key for key in before if not any(part in key for part in copies)}
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in after)
    assert plain_config(written) == plain_config(config)


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding", "head", "bias-all"])
def test_bfloat16_files_stay_bfloat16_both_ways(name, tmp_path):
    case = CASES[name]
    theirs = peft_model(case).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "peft")
    ours = case.base()
    lk.load(ours, tmp_path / "peft")
    lk.save(ours, tmp_path / "ours")
    before, _ = stored(tmp_path / "peft")
    after, _ = stored(tmp_path / "ours")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[key].view(torch.int16), before[key].view(torch.int16)) for key in after)

    base = case.base().to(torch.bfloat16)
    again = peft_load(case, tmp_path / "ours", base, autocast_adapter_dtype=False)
    again.save_pretrained(tmp_path / "again")
    final, _ = stored(tmp_path / "again")
    adapter = [key for key in after if "lora_" in key]
    assert adapter
    assert all(final[key].dtype == torch.bfloat16 and torch.equal(final[key], after[key]) for key in adapter)


@pytest.mark.parametrize(
    "name", ["linear", "conv1d-all", "embedding", "head-seq-cls", "rank-pattern", "rslora", "bias-lora-only", "t5"]
)
def test_five_steps_of_training_end_in_the_same_parameters(name, tmp_path):
    case = CASES[name]
    theirs = peft_model(case)
    theirs.save_pretrained(tmp_path / "start")
    ours = case.base()
    lk.load(ours, tmp_path / "start", trainable=True)
    start, _ = stored(tmp_path / "start")

    wanted = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    trained = lk.parameters(ours, "default")
    assert sum(p.numel() for p in wanted) == sum(p.numel() for p in trained)
    pairs = [(theirs, torch.optim.AdamW(wanted, lr=1e-2)), (ours, torch.optim.AdamW(trained, lr=1e-2))]
    for step in range(5):
        losses = []
        for model, optimizer in pairs:
            inputs = tiny.batch(case.base(), rows=2 + step % 2, labels=True)
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    theirs.save_pretrained(tmp_path / "peft")
    lk.save(ours, tmp_path / "ours")
    expected, _ = stored(tmp_path / "peft")
    found, _ = stored(tmp_path / "ours")
    moved = max(float((found[key] - start[key]).abs().max()) for key in found)
    assert moved > 1e-3
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], msg=lambda text, key=key: f"{key}: {text}", **CLOSE)


def test_a_minimal_config_means_what_peft_takes_it_for(tmp_path):
    case = CASES["linear"]
    lk.save(lorakit_model(case), tmp_path)
    (tmp_path / "lorakit.json").unlink()
    least = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(least))
    ours = case.base()
    lk.load(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(peft_load(case, tmp_path)), **CLOSE)
