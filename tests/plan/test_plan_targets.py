"""Short names of matrices, by architecture."""

import pytest
import tiny

from lorakit.errors import TargetError
from lorakit.methods.lora import LoRA
from lorakit.plan.targets import spelt_out

NAMES = {
    "llama": (["q_proj", "v_proj"], ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj"]),
    "roberta": (["query", "value"], ["attention.output.dense", "key", "query", "value"], ["output.dense"]),
    "deberta": (
        ["query_proj", "value_proj"],
        ["attention.output.dense", "key_proj", "query_proj", "value_proj"],
        ["output.dense"],
    ),
    "gpt2": (["c_attn"], ["attn.c_proj", "c_attn"], ["mlp.c_proj"]),
}


@pytest.mark.parametrize("kind", NAMES)
def test_short_names_find_the_matrices(kind):
    model = tiny.MODELS[kind]()
    for short, wanted in zip((["q", "v"], ["q", "k", "v", "o"], ["down"]), NAMES[kind], strict=True):
        paths = spelt_out(LoRA(target_modules=short), model).targets(model)
        expected = [path for path, _ in model.named_modules() if any(path.endswith("." + name) for name in wanted)]
        if wanted == ["output.dense"]:
            expected = [path for path in expected if "attention" not in path]
        assert sorted(paths) == sorted(expected)


def test_a_fused_projection_is_adapted_in_parts():
    model = tiny.gpt2()
    assert spelt_out(LoRA(target_modules=["q", "v"]), model).enable_lora == {"c_attn": [True, False, True]}
    assert spelt_out(LoRA(target_modules=["k"]), model).enable_lora == {"c_attn": [False, True, False]}
    assert spelt_out(LoRA(target_modules=["c_attn"]), model).enable_lora == {}


def test_names_of_the_model_itself_stay():
    for names in (["q_proj"], "all-linear", r".*\.q_proj"):
        method = LoRA(target_modules=names)
        assert spelt_out(method, tiny.llama()).target_modules == names
    model = tiny.t5()
    assert spelt_out(LoRA(target_modules=["q", "v"]), model).target_modules == ["q", "v"]


def test_a_matrix_that_is_not_there():
    with pytest.raises(TargetError, match=r"no matrix known as gate\. .*c_attn"):
        spelt_out(LoRA(target_modules=["q", "gate"]), tiny.gpt2())


def test_a_fused_matrix_that_is_cut_head_by_head_has_no_parts():
    from transformers import CodeGenConfig, CodeGenForCausalLM, GPTBigCodeConfig, GPTBigCodeForCausalLM

    big = GPTBigCodeForCausalLM(GPTBigCodeConfig(n_embd=32, n_head=4, n_layer=2, vocab_size=64, multi_query=False))
    gen = CodeGenForCausalLM(CodeGenConfig(n_embd=32, n_head=4, n_layer=2, vocab_size=64, rotary_dim=4))
    for model in (tiny.deberta_v1(), big, gen):
        with pytest.raises(TargetError, match="no matrix known as q"):
            spelt_out(LoRA(target_modules=["q"]), model)
