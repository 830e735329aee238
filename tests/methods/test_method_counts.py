"""Every row of the paper's parameter counts that must come out exactly, on the meta device (Hu et al. 2021, section 5, app. E).

A row is (shape, method, exact count): append rows of further methods to ROWS.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.attach.anatomy import output_head
from lorakit.attach.method import Method
from lorakit.methods.adapter_drop import AdapterDrop
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.kept import with_head
from lorakit.methods.lin import LinAdapter
from lorakit.methods.pfeiffer import PfeifferAdapter
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt_embedding import PromptEmbedding
from lorakit.plan.source import find
from lorakit.plan.targets import spelt_out

Row = tuple[str, Method, int]

QV = ["q", "v"]
ROWS: dict[str, Row] = {
    "RoBERTa base, LoRA r=8": ("roberta-base", lk.LoRA(r=8, target_modules=QV), 294_912),
    "RoBERTa large, LoRA r=8": ("roberta-large", lk.LoRA(r=8, target_modules=QV), 786_432),
    "DeBERTa XXL, LoRA r=16": ("deberta-xxl", lk.LoRA(r=16, target_modules=QV), 4_718_592),
    "GPT-2 medium, LoRA r=4": ("gpt2-medium", lk.LoRA(r=4, target_modules=QV), 393_216),
    "GPT-2 large, LoRA r=4": ("gpt2-large", lk.LoRA(r=4, target_modules=QV), 737_280),
    **{
        f"GPT-3, LoRA r={r}": ("gpt3-175b", lk.LoRA(r=r, target_modules=QV), count)
        for r, count in ((1, 4_718_592), (4, 18_874_368), (8, 37_748_736))
    },
    **{
        f"GPT-3, adapter-H r={r}": ("gpt3-175b", HoulsbyAdapter(r=r), count)
        for r, count in ((1, 7_078_080), (4, 21_234_432), (8, 40_109_568), (16, 77_859_840), (64, 304_361_472))
    },
    "GPT-2 medium, adapter-L r=6": ("gpt2-medium", LinAdapter(r=6), 368_784),
    "GPT-2 medium, adapter-L r=224": ("gpt2-medium", LinAdapter(r=224), 11_089_152),
    "GPT-2 large, adapter-L r=8": ("gpt2-large", LinAdapter(r=8), 875_808),
    "GPT-2 large, adapter-L r=248": ("gpt2-large", LinAdapter(r=248), 23_002_848),
    "GPT-2 medium, top-2 layers": ("gpt2-medium", FullFineTuning(top_layers=2), 25_192_448),
    "RoBERTa large, adapter-H r=8": ("roberta-large", HoulsbyAdapter(r=8), 835_968),
    "RoBERTa large, adapter-H r=64": ("roberta-large", HoulsbyAdapter(r=64), 6_343_680),
    "RoBERTa large, adapter-P r=16": ("roberta-large", PfeifferAdapter(r=16), 811_392),
    "RoBERTa large, adapter-P r=64": ("roberta-large", PfeifferAdapter(r=64), 3_171_840),
    "RoBERTa base, adapter-D r=16": ("roberta-base", AdapterDrop(r=16), 304_320),
    "RoBERTa base, adapter-D r=48": ("roberta-base", AdapterDrop(r=48), 894_528),
    "BitFit, RoBERTa base": ("roberta-base", BitFit(), 102_144),
    "BitFit, GPT-3": ("gpt3-175b", BitFit(), 12_988_416),
    "GPT-3, prefix-embedding 256+8": ("gpt3-175b", PromptEmbedding(256, 8), 3_244_032),
    "GPT-3, prefix-layer 8+8, keys and values": ("gpt3-175b", PrefixTuning(8, 8), 2 * 18_874_368),
    "GPT-2 medium, all": ("gpt2-medium", FullFineTuning(), 354_823_168),
    "GPT-2 large, all": ("gpt2-large", FullFineTuning(), 774_030_080),
    "GPT-3, all": ("gpt3-175b", FullFineTuning(), 174_604_259_328),
}


@cache
def shape(name: str) -> nn.Module:
    return find(name, None).build(torch.float32)


def fitted(method: Any, model: nn.Module) -> tuple[Any, int]:
    """(the method as the paper runs it, the numbers of the classifier's head, which is trained but not counted)."""
    if isinstance(method, lk.LoRA):
        method = spelt_out(method, model)
    head = output_head(model)
    if not type(model).__name__.endswith("SequenceClassification") or head is None:
        return method, 0
    size = sum(parameter.numel() for parameter in model.get_submodule(head).parameters())
    return with_head(method, head), size


@pytest.mark.parametrize("case", ROWS)
def test_the_papers_exact_count(case: str) -> None:
    name, method, expected = ROWS[case]
    model = shape(name)
    own, head = fitted(method, model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    base = sum(parameter.numel() for parameter in model.parameters())
    try:
        report = lk.attach(model, own, name="a")
        counts = lk.count_parameters(model)
    finally:
        lk.detach(model, "a")
    assert report.trainable - head == expected
    assert counts.trainable == report.trainable == counts.low_rank + counts.inserted + counts.replaced
    if not counts.replaced or head:
        assert (counts.low_rank or counts.inserted or counts.replaced - head) == expected
    assert lk.count_parameters(model).total == base


@pytest.mark.parametrize(("layers", "d", "r"), [(2, 32, 1), (3, 48, 5)])
def test_counts_follow_the_formulae(layers: int, d: int, r: int) -> None:
    """L (2 d r + r + d) + 2 L_LN d with L the number of adapters (section 5.1)."""
    from tiny import gpt2

    one = 2 * d * r + r + d
    wanted = {
        HoulsbyAdapter(r=r): 2 * layers * one,
        PfeifferAdapter(r=r): layers * one,
        AdapterDrop(r=r, drop=1): (layers - 1) * one,
        LinAdapter(r=r): layers * (one + 2 * d),
    }
    for method, count in wanted.items():
        model = gpt2(n_layer=layers, n_embd=d)
        lk.attach(model, method)
        assert lk.count_parameters(model).inserted == count


def test_a_head_beside_the_top_layers_is_counted_apart() -> None:
    from tiny import roberta

    model = roberta()
    block = sum(parameter.numel() for parameter in model.roberta.encoder.layer[1].parameters())
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    lk.attach(model, replace(FullFineTuning(top_layers=1), modules_to_save=["classifier"]))
    counts = lk.count_parameters(model)
    assert (counts.replaced, counts.trainable, counts.inserted) == (block + head, block + head, 0)
