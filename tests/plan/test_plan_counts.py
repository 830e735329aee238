"""The paper's numbers of parameters, and published totals, from named shapes (Hu et al. 2021, tables 2 to 4, section 4.2)."""

import pytest

from lorakit.methods.lora import LoRA
from lorakit.plan import FULL, SHAPES, plan
from lorakit.plan.source import find

QV = ["q", "v"]
COUNTS = {
    ("roberta-base", 8): 294_912,
    ("roberta-large", 8): 786_432,
    ("deberta-xxl", 16): 4_718_592,
    ("gpt2-medium", 4): 393_216,
    ("gpt2-large", 4): 737_280,
    ("gpt3-175b", 1): 4_718_592,
    ("gpt3-175b", 8): 37_748_736,
}
TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.mark.parametrize(("name", "r"), COUNTS)
def test_trained_parameters_of_the_paper(name, r):
    found = plan(name, LoRA(r=r, target_modules=QV), batch=1, length=8)
    assert found.rows[1].trainable == COUNTS[name, r]
    assert found.rows[1].total == found.parameters + COUNTS[name, r]


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name):
    import torch

    model = find(name, None).build(torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]


def test_every_shape_is_planned():
    for name in SHAPES:
        found = plan(name, LoRA(r=4, target_modules=["q", "k", "v", "o"]), batch=1, length=8, adapter_dtype="float32")
        assert not found.notes, (name, found.notes)
        assert 0 < found.rows[1].memory.peak < found.rows[0].memory.peak, name


def test_gpt3_as_the_paper_has_it():
    found = plan("gpt3-175b", LoRA(r=4, target_modules=QV), batch=1, length=16)
    full, lora = found.rows
    assert (full.trainable, lora.trainable, round(lora.ratio)) == (174_604_259_328, 18_874_368, 9_251)
    assert lora.checkpoint_bytes == 37_748_736
    assert (full.hundred_bytes, lora.hundred_bytes) == (34_920_851_865_600, 352_983_392_256)
    printed = {one.what: (one.printed, one.planned) for one in found.paper}
    assert round(printed["parameters for one trained"][0]) == 9_285
    assert printed["training memory, LoRA, bytes"][1] == pytest.approx(350e9, rel=0.005)
    moments, gradients = (
        printed[f"training memory, full fine-tuning, {what}, bytes"][1]
        for what in ("weights and moments", "with gradients")
    )
    assert moments < 1.2e12 < gradients


def test_a_head_is_trained_but_counted_apart():
    found = plan("roberta-base", LoRA(r=8, target_modules=QV), batch=1, length=8)
    assert found.rows[1].head == 768 * 768 + 768 + 768 * 2 + 2
    assert found.rows[1].checkpoint_bytes == 4 * (294_912 + found.rows[1].head)


def test_full_stands_first_whatever_is_asked():
    assert [row.method for row in plan("minilm-l6", FULL, length=8).rows] == ["full fine-tuning"]
    rows = plan("minilm-l6", length=8).rows
    assert rows[0].method == "full fine-tuning"
    assert [row.method for row in rows[1:]][:2] == ["LoRA r=1 on q, v", "LoRA r=4 on q, v"]
