"""`lorakit bench latency`: every side is what it says, and the model is as before."""

import pytest
import tiny
import torch

from lorakit.attach.api import adapters, attach, detach
from lorakit.attach.host import host_of
from lorakit.bench.latency import LatencyBench, bench_latency, lora_for, width_for
from lorakit.bench.shapes import SHAPES
from lorakit.errors import UsageError
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lin import LinAdapter
from lorakit.run.turns import adapted_side, in_turns, merged_side, plain_side

SIDES = ["full", "LoRA merged", "LoRA", "adapter L", "adapter H"]


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_every_side_at_every_setting(folders, model):
    config = LatencyBench(model=folders[model], settings=("2x8@3k", "1x6+3@1000"), trials=2)
    report = bench_latency(config)
    assert [str(one.setting) for one in report.results] == ["2x8", "1x6+3"]
    for one in report.results:
        assert [side.side for side in one.sides] == SIDES
        full, merged, lora = one.sides[:3]
        assert (full.r, full.trained, full.ratio_mean, full.ratio_spread) == (None, None, 1, 0)
        assert (merged.r, merged.trained) == (lora.r, lora.trained)
        for side in one.sides:
            assert min(side.mean, side.median, side.ratio_mean) > 0
        for side in one.sides[1:]:
            assert abs(side.trained - one.setting.parameters) <= 0.3 * one.setting.parameters
    assert report.to_json()["config"]["trials"] == 2


def test_widths_meet_the_papers_counts():
    """Table 3 and the adapters' formula: adapter L of width 224 trains 11,089,152 of GPT-2 medium, LoRA of rank 4 393,216."""
    with torch.device("meta"):
        model = SHAPES["gpt2-medium"][1]()
    assert width_for(model, LinAdapter, 11_089_152) == 224
    assert width_for(model, lora_for(model), 393_216) == 4
    assert width_for(model, HoulsbyAdapter, 11_100_000) == 112


def test_each_side_is_the_model_in_that_state():
    """Timed work sees the plain model, the adapter's output, and the merged one; afterwards nothing is left."""
    model = tiny.gpt2()
    inputs = tiny.batch(model)
    plain = model(**inputs).logits
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, lora_for(model)(4), name="a", seed=0, trainable=False)
    record = host_of(model).records["a"]
    with torch.no_grad():
        for tensor in record.tensors():
            tensor.normal_(generator=torch.Generator().manual_seed(1))
        adapted = model(**inputs).logits
    detach(model, "a")
    assert not torch.allclose(plain, adapted)
    seen = {"plain": [], "adapted": [], "merged": []}
    sides = [plain_side("plain"), adapted_side("adapted", model, record), merged_side("merged", model, record)]

    def work():
        name = ["plain", "adapted", "merged"][bool(adapters(model)) + bool(adapters(model) and host_of(model).merged)]
        seen[name].append(model(**inputs).logits.detach())

    with torch.no_grad():
        times = in_turns(sides, work, 3)
    assert {name: len(values) for name, values in times.items()} == {"plain": 3, "adapted": 3, "merged": 3}
    assert all(torch.equal(one, plain) for one in seen["plain"])
    assert all(torch.equal(one, adapted) for one in seen["adapted"])
    assert all(torch.allclose(one, adapted, atol=1e-4) for one in seen["merged"])
    assert all(len(one) == 8 for one in seen.values())  # two calls in each of four turns
    assert adapters(model) == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_work_that_fails_leaves_the_model_plain():
    model = tiny.gpt2()
    attach(model, lora_for(model)(4), name="a", trainable=False)
    record = host_of(model).records["a"]
    detach(model, "a")

    def work():
        raise RuntimeError("no")

    for side in (adapted_side("adapted", model, record), merged_side("merged", model, record)):
        with pytest.raises(RuntimeError, match="no"):
            in_turns([side], work, 1)
        assert adapters(model) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": ("4x128",)}, "expected a setting such as 4x128@0.5M"),
        ({"settings": ("0x128@1M",)}, "at least 1"),
        ({"settings": ()}, "name at least one"),
        ({"trials": 1}, "trials must be at least 2"),
    ],
)
def test_mistakes_in_the_settings(values, message):
    with pytest.raises(UsageError, match=message):
        LatencyBench(**values)


def test_what_does_not_fit_is_told_first(folders):
    with pytest.raises(UsageError, match="longer than the model's 64 positions"):
        bench_latency(LatencyBench(model=folders["gpt2"], settings=("1x60+8@1k",)))
    with pytest.raises(UsageError, match="no decoder"):
        bench_latency(LatencyBench(model="minilm"))
