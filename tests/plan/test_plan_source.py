"""What can be planned for, and what cannot."""

import pytest
import tiny
import torch
from torch import nn

from lorakit.errors import ModelError, TargetError, UsageError
from lorakit.methods.lora import LoRA
from lorakit.plan import FULL, GPUS, plan
from lorakit.plan.gpus import MiB, smallest


def test_a_folder_with_a_config_alone_a_config_and_a_model_agree(tmp_path):
    model = tiny.llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    size = sum(parameter.numel() for parameter in model.parameters())
    for subject in (str(tmp_path), tmp_path, tmp_path / "config.json", model.config, model):
        found = plan(subject, LoRA(r=2), batch=2, length=8)
        assert (found.parameters, found.task, found.notes) == (size, "causal-lm", ())
        assert found.rows[1].memory.peak < found.rows[0].memory.peak
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_every_tiny_architecture_is_followed(kind):
    task = "sequence-classification" if kind in ("roberta", "bert", "deberta") else None
    found = plan(tiny.MODELS[kind](), batch=2, length=8, task=task, method=LoRA(r=2))
    assert not found.notes
    assert found.rows[1].flops < found.rows[0].flops


def test_a_name_that_is_unknown_names_the_nearest(tmp_path):
    with pytest.raises(ModelError, match="Did you mean 'gpt3-175b'"):
        plan("gpt3-175 b")
    with pytest.raises(ModelError, match=r"expected config\.json"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no configuration"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch must be"),
        ({"length": 2.5}, "length must be"),
        ({"length": 2000}, "length 2000 is more than the 1024"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"device": "tpu"}, "device must be"),
        ({"optimizer": "adam"}, "expected one of: adamw"),
        ({"task": "chess"}, "task 'chess' is unknown"),
        ({"task": "feature-extraction"}, "no training task"),
        ({"method": "lora"}, "not 'lora'"),
    ],
)
def test_a_bad_argument_is_told(options, said):
    with pytest.raises(UsageError, match=said):
        plan("gpt2", **{"method": FULL, "length": 8, **options})


def test_a_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(UsageError, match="not Linear"):
        plan(nn.Linear(2, 2))


def test_targets_that_match_nothing_are_told():
    with pytest.raises(TargetError, match="matches target_modules"):
        plan("gpt2", LoRA(target_modules=["q_prj"]), length=8)


def test_a_model_that_needs_values_still_has_its_counts(monkeypatch):
    def forward(self, input_ids=None, **more):
        raise ValueError("branches on its data" if input_ids.is_meta else "")

    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    found = plan("gpt2", LoRA(r=4, target_modules=["q", "v"]), length=8)
    assert "branches on its data" in found.notes[0]
    assert (found.rows[1].trainable, found.rows[1].memory, found.rows[1].fits) == (147_456, None, None)


def test_the_smallest_gpu_that_holds_it():
    assert [gpu.memory for gpu in GPUS] == sorted(gpu.memory for gpu in GPUS)
    assert str(smallest(1, bfloat16=False)) == "RTX 3080 10 GB"
    assert str(smallest(10_000 * MiB, bfloat16=False)) == "RTX 2080 Ti 11 GB"
    assert str(smallest(10_000 * MiB, bfloat16=True)) == "A10 24 GB"
    assert str(smallest(GPUS[-1].usable, bfloat16=True)) == "H200 141 GB"
    assert str(smallest(GPUS[-1].usable + 1, bfloat16=True)) == "2 x H200 141 GB"


def test_a_plan_leaves_torch_as_it_was():
    before = torch.is_autocast_enabled
    plan("minilm-l6", FULL, length=8)
    assert torch.is_autocast_enabled is before
