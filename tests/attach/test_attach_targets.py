"""Targets: PEFT's own functions decide what ours must select."""

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.attach.targets import layer_number, pattern_value, shortest_names
from lorakit.errors import TargetError

TABLE = {
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
        {"target_modules": r".*\.h\.\d\.(attn|mlp)\.c_proj", "exclude_modules": r".*h\.0.*"},
        {"target_modules": ["wte", "c_fc"], "layers_to_transform": 1},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 1], "layers_pattern": "h"},
        {"target_modules": ["transformer.h.0.attn.c_attn", "c_fc"], "layers_to_transform": [1]},
        {"target_modules": "all-linear"},
    ],
    "roberta": [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
        {"target_modules": ["dense"]},
        {"target_modules": ["attention.output.dense"], "layers_to_transform": [1], "layers_pattern": ["layer"]},
        {"target_modules": r"roberta\.encoder\.layer\.\d+\.attention\.self\.(query|key)"},
        {"target_modules": "all-linear"},
    ],
    "deberta": [
        {"target_modules": ["query_proj", "value_proj"]},
        {"target_modules": ["word_embeddings", "key_proj"], "exclude_modules": "deberta.encoder.layer.0.*"},
        {"target_modules": ["dense"], "layers_to_transform": [0], "modules_to_save": ["classifier", "pooler"]},
        {"target_modules": "all-linear"},
    ],
    "llama": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["self_attn.q_proj", "lm_head"]},
        {"target_modules": r".*proj", "exclude_modules": ["o_proj", "gate_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        {"target_modules": "all-linear"},
    ],
    "t5": [
        {"target_modules": ["q", "v"]},
        {"target_modules": ["wi", "wo", "embed_tokens"]},
        {"target_modules": ["EncDecAttention.k"], "layers_to_transform": 0},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"target_modules": "all-linear"},
    ],
}
CASES = [(kind, fields) for kind, rows in TABLE.items() for fields in rows]


def peft_selection(model, fields, kind):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    if kind in ("roberta", "deberta") and fields["target_modules"] == "all-linear":  # what PeftModel adds for the task
        fields = fields | {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    config = _maybe_include_all_linear_layers(LoraConfig(**fields), model)
    return [path for path, _ in model.named_modules() if path and check_target_module_exists(config, path)]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_selection_is_pefts(kind, fields):
    model = tiny.MODELS[kind]()
    expected = peft_selection(model, fields, kind)
    lora = lk.LoRA(**fields)
    if not expected:
        with pytest.raises(TargetError, match=r"no module of .* matches"):
            lora.targets(model)
        return
    assert lora.targets(model) == expected
    lk.attach(model, lk.LoRA(r=2), name="resident")  # adapted leaves are matched alike
    assert lora.targets(model) == expected


@pytest.mark.parametrize("kind", adapting.FIVE)
def test_attach_adapts_what_targets_says(kind):
    model = tiny.MODELS[kind]()
    lora = lk.LoRA(r=2)
    assert list(lk.attach(model, lora).modules) == lora.targets(model)
    assert not any("classifier" in path or "lm_head" in path for path in lora.targets(model))


@pytest.mark.parametrize(
    "path", ["model.layers.3.q", "layers.3.q", "a.layers.3.experts.5.w", "layers.x.q", "encoder.block.1.layer.0.q"]
)
@pytest.mark.parametrize("patterns", [["layers"], ["h", "layers"], ["block"], ["(layers|block)"]])
def test_layer_numbers_are_pefts(path, patterns):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    number = layer_number(path, patterns)
    for candidate in range(6):
        config = LoraConfig(target_modules=["q", "w"], layers_to_transform=[candidate], layers_pattern=list(patterns))
        assert bool(check_target_module_exists(config, path)) is (number == candidate)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 2},
        {"layers.0.self_attn.q_proj": 3, "q_proj": 2},
        {"q_proj": 2, "layers.0.self_attn.q_proj": 3},
        {r"layers\.[01]\..*_proj": 5},
        {"proj": 9},
        {"^model.layers.1.*": 4},
    ],
)
def test_patterns_are_pefts(patterns):
    from peft.utils.other import get_pattern_key

    for path, _ in tiny.llama().named_modules():
        assert pattern_value(patterns, path, 8) == patterns.get(get_pattern_key(patterns.keys(), path), 8)


def test_ranks_and_alphas_by_pattern():
    model = tiny.llama()
    lora = lk.LoRA(
        r=4,
        alpha=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\..*": 3},
    )
    lk.attach(model, lora, name="a")
    for path, pair in adapting.host(model).records["a"].draft.pairs.items():
        rank, alpha = 2 if "q_proj" in path else 4, 3 if ".1." in path else 8
        assert (pair.A.shape[0], pair.Bt.shape[0], pair.scale) == (rank, rank, alpha / rank)


def test_nothing_matched_names_what_is_near():
    with pytest.raises(TargetError, match=r"Did you mean .*q_proj.*can be adapted: .*down_proj") as caught:
        lk.LoRA(target_modules=["q_prj"]).targets(tiny.llama())
    assert "LlamaForCausalLM" in str(caught.value)
    with pytest.raises(TargetError, match=r"with exclude_modules=\['q_proj'\] and layers_to_transform=\[1\]"):
        lk.LoRA(target_modules=["q_proj"], exclude_modules=["q_proj"], layers_to_transform=1).targets(tiny.llama())
    with pytest.raises(TargetError, match=r"modules_to_save names 'clasifier'.*Its parts are: roberta, classifier"):
        lk.LoRA(modules_to_save=["clasifier"]).targets(tiny.roberta())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": "["},
        {"target_modules": ["q_proj"], "rank_pattern": {"*q": 2}},
    ],
)
def test_what_is_no_regular_expression_says_so(fields):
    with pytest.raises(TargetError, match="no regular expression"):
        lk.attach(tiny.llama(), lk.LoRA(**fields))


def test_unsupported_layers_are_named():
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp matches .* LlamaMLP, which takes no low-rank update"):
        lk.attach(tiny.llama(), lk.LoRA(target_modules=["mlp"]))
    with pytest.raises(TargetError, match="RMSNorm"):
        lk.attach(tiny.llama(), lk.LoRA(target_modules=["norm"]))


def test_a_layer_that_is_never_called_is_refused_and_left_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="reads its weight without calling it"):
        lk.attach(model, lk.LoRA(r=2, target_modules=["out_proj"]))
    assert lk.attach(model, lk.LoRA(r=2)).modules == ("linear",)


def test_shortest_names_match_just_the_paths():
    model = tiny.gpt2()
    every = [path for path, _ in model.named_modules() if path.endswith("c_proj")]
    assert shortest_names(model, every) == ["c_proj"]
    assert shortest_names(model, every[:1]) == every[:1]
    assert shortest_names(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), ["0"]) == ["0"]


def test_plain_torch_modules_are_models_too():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    report = lk.attach(model, lk.LoRA(r=2))
    assert report.modules == ("0", "2")
    assert report.trainable == 2 * (6 + 5) + 2 * (5 + 4)
    model(torch.randn(3, 6)).sum().backward()


def test_a_table_that_is_given_more_than_ids_takes_no_pair():
    """OPT's positions are looked up by a count of the mask: an update of the rows that the mask names would be another."""
    with pytest.raises(TargetError, match="more than ids"):
        lk.attach(tiny.opt(), lk.LoRA(r=2, target_modules=["embed_positions"]))
    lk.attach(tiny.opt(), lk.LoRA(r=2, target_modules=["embed_tokens"]))
