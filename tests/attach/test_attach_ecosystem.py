"""accelerate's hooks, transformers' Trainer, save_pretrained, DDP and FSDP2 go on working on an attached model."""

import adapting
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError


class Doubling:
    """A hook that shows whether it ran."""

    def __new__(cls):
        from accelerate.hooks import ModelHook

        class Hook(ModelHook):
            def post_forward(self, module, output):
                return output * 2

        return Hook()


def test_hooks_added_before_attach_run_and_are_restored():
    from accelerate.hooks import add_hook_to_module, attach_align_device_hook

    model = tiny.llama()
    attach_align_device_hook(model, execution_device="cpu")
    leaf = model.model.layers[0].mlp.up_proj
    add_hook_to_module(leaf, Doubling(), append=True)
    inputs, before = tiny.batch(model), adapting.snapshot(model)
    base = adapting.logits(model, inputs)
    lk.attach(model, lk.LoRA(r=4), name="a")
    assert torch.equal(adapting.logits(model, inputs), base)
    adapting.grow(model, "a")
    x = torch.randn(2, 32)
    pair = adapting.host(model).records["a"].draft.pairs["model.layers.0.mlp.up_proj"]
    expected = 2 * nn.functional.linear(x, leaf.weight) + pair.scale * (x @ pair.A.T) @ pair.Bt
    torch.testing.assert_close(leaf(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(leaf(x), expected)
    lk.merge(model, "a")
    assert "forward" in leaf.__dict__
    lk.unmerge(model)
    lk.detach(model, "a")
    adapting.assert_same(before, adapting.snapshot(model))
    assert torch.equal(adapting.logits(model, inputs), base)


def test_hooks_added_after_attach_stop_detach_and_merge():
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model = tiny.llama()
    before = adapting.snapshot(model)
    lk.attach(model, lk.LoRA(r=4), name="a")
    add_hook_to_module(model.model.layers[0].mlp.up_proj, Doubling())
    for verb in (lk.detach, lk.merge):
        with pytest.raises(AdapterError, match="remove_hook_from_module"):
            verb(model, "a")
    assert lk.adapters(model)["a"].active
    remove_hook_from_module(model, recurse=True)
    lk.detach(model, "a")
    adapting.assert_same(before, adapting.snapshot(model))


def test_offloaded_layers_are_refused():
    from accelerate import cpu_offload

    model = tiny.llama()
    cpu_offload(model)
    with pytest.raises(AdapterError, match="offloaded"):
        lk.attach(model, lk.LoRA(r=4), name="a")
    assert lk.adapters(model) == {}


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generate_with_an_adapter_equals_generate_of_the_merged(kind):
    model = adapting.attached(kind, "a")
    ids = tiny.batch(model)["input_ids"]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = model.generate(ids, **how)
    with lk.use(model, None):
        assert not torch.equal(model.generate(ids, **how), tokens)
    lk.merge(model, "a")
    assert torch.equal(model.generate(ids, **how), tokens)


@pytest.mark.parametrize("active", [True, False])
def test_save_pretrained_writes_the_base_and_the_active_adapter(tmp_path, active):
    from safetensors.torch import load_file

    model = adapting.attached("llama", "a")
    if not active:
        lk.use(model, None)
    model.save_pretrained(tmp_path)
    found, plain = load_file(tmp_path / "model.safetensors"), tiny.llama().state_dict()
    assert {key for key in found if "lora_" not in key} == set(plain)
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert any("lora_" in key for key in found) is active


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        ids = torch.randint(3, tiny.VOCAB, (6,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer(folder, **arguments):
    from transformers import Trainer, TrainingArguments

    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=4, bias="lora_only"), name="a", seed=0)
    base = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=4,
        save_steps=2,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=Rows()), base


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_and_resumes(tmp_path):
    whole, base = trainer(tmp_path / "whole")
    start = [p.detach().clone() for p in lk.parameters(whole.model, "a")]
    whole.train()
    end = lk.parameters(whole.model, "a")
    assert all(not torch.equal(p, q) for p, q in zip(start, end, strict=True))
    assert all(torch.equal(whole.model.state_dict()[key], value) for key, value in base.items())
    again, _ = trainer(tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 4
    for p, q in zip(lk.parameters(again.model, "a"), end, strict=True):
        assert torch.equal(p, q)


@pytest.fixture
def _one_process(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore")
def test_ddp_gives_the_same_gradients():
    model = adapting.attached("llama", "a")
    inputs = tiny.batch(model, labels=True)
    model(**inputs).loss.backward()
    expected = [p.grad.clone() for p in lk.parameters(model, "a")]
    model.zero_grad(set_to_none=True)
    nn.parallel.DistributedDataParallel(model)(**inputs).loss.backward()
    for p, theirs in zip(lk.parameters(model, "a"), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore")
def test_fsdp2_gives_the_same_gradients():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapting.attached("llama", "a")
    inputs = tiny.batch(model, labels=True)
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**inputs).loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    assert list(found) == list(expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])
    for p in lk.parameters(model, "a"):
        assert p.grad is not None
