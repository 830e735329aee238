"""Loading from a folder: what comes out, and every kind of bad folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from lorakit import models
from lorakit.errors import ModelError, UsageError


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_bit_for_bit(folder, llama):
    loaded = models.load(str(folder))
    assert (loaded.name, loaded.source, loaded.task, loaded.initialised) == (str(folder), str(folder), "causal-lm", ())
    expected = llama.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_pad_token_config_and_generation_are_in_step(folder):
    loaded = models.load(str(folder))
    assert loaded.tokenizer.pad_token == "<|im_end|>"
    assert loaded.model.config.pad_token_id == loaded.model.generation_config.pad_token_id == 2


def test_a_pad_token_that_is_there_stays(folder):
    edit(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    loaded = models.load(str(folder))
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == 0


def test_published_sampling_defaults_do_not_make_greedy_a_lottery(folder, recwarn):
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, eos_token_id=[2, 0]).save_pretrained(folder)
    model = models.load(str(folder)).model
    assert model.generation_config.eos_token_id == [2, 0]
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    first = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(first, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    model.generation_config.validate(strict=True)
    assert not recwarn.list


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_is_rounded_once(folder, llama, dtype, kind):
    model = models.load(str(folder), dtype=dtype).model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, llama.get_parameter(name).to(kind))


def test_a_bf16_file_is_exact_in_fp32(folder):
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = models.load(str(folder), dtype="float32").model
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in tensors.items())


def test_a_classifier_gets_a_head_that_the_seed_decides(folder, llama):
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(models.load(str(folder), task="sequence-classification", label_names=["no", "yes", "so"]))
    assert made[0].initialised == ("score.weight",)
    heads = [loaded.model.score.weight for loaded in made]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(made[0].model.model.norm.weight, llama.model.norm.weight)
    config = made[0].model.config
    assert config.id2label == {0: "no", 1: "yes", 2: "so"}
    assert config.label2id == {"no": 0, "yes": 1, "so": 2}
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")


def test_a_saved_classifier_keeps_its_head_and_labels_unless_others_are_asked_for(folder, tmp_path):
    loaded = models.load(str(folder), task="sequence-classification", label_names=["no", "yes", "so"])
    saved = tmp_path / "classifier"
    loaded.model.save_pretrained(saved)
    loaded.tokenizer.save_pretrained(saved)
    again = models.load(str(saved), task="sequence-classification")
    assert again.initialised == ()
    assert torch.equal(again.model.score.weight, loaded.model.score.weight)
    assert again.model.config.id2label[2] == "so"
    other = models.load(str(saved), task="sequence-classification", num_labels=2)
    assert other.initialised == ("score.weight",)
    assert other.model.score.weight.shape[0] == 2


def test_regression_has_one_output(folder):
    model = models.load(str(folder), task="sequence-classification", regression=True).model
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_feature_extraction_is_the_bare_model(folder, llama):
    model = models.load(str(folder), task="feature-extraction").model
    assert type(model).__name__ == "LlamaModel"
    assert torch.equal(model.norm.weight, llama.model.norm.weight)


def test_seq2seq(tmp_path, tokenizer):
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    loaded = models.load(str(tmp_path / "t5"), task="seq2seq")
    assert loaded.model.config.is_encoder_decoder
    assert models.longest_row(loaded.model, loaded.tokenizer) is None


def test_longest_row_is_the_models_positions_or_the_tokenizers_limit(folder):
    loaded = models.load(folder)
    assert models.longest_row(loaded.model, loaded.tokenizer) == 64
    loaded.tokenizer.model_max_length = 50
    assert models.longest_row(loaded.model, loaded.tokenizer) == 50


def test_robertas_first_positions_are_its_own(tokenizer):
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.max_position_embeddings, config.pad_token_id = 20, 1
    model = RobertaModel(config)
    longest = models.longest_row(model, tokenizer)
    assert longest == 18
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_loading_is_silent_and_leaves_the_loggers_as_they_were(folder, capfd):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    models.load(str(folder), task="sequence-classification", num_labels=2)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "translation"}, "task 'translation'.*causal-lm"),
        ({"dtype": "int8"}, "dtype 'int8'.*bfloat16"),
        ({"dtype": torch.int8}, "dtype torch.int8"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"num_labels": 2}, "belong to sequence-classification"),
        ({"task": "sequence-classification"}, "no classifier yet"),
        ({"task": "sequence-classification", "num_labels": 1}, "at least 2 labels"),
        ({"task": "sequence-classification", "num_labels": 3, "label_names": ["a", "b"]}, "3 different label_names"),
        ({"task": "sequence-classification", "label_names": ["a", "a"]}, "2 different label_names"),
        ({"task": "sequence-classification", "num_labels": 3, "regression": True}, "one number"),
    ],
)
def test_bad_arguments(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        models.load(str(folder), **changes)


def test_a_folder_without_config(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"expected config.json in it, came an empty folder"):
        models.load(str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.gguf").touch()
    with pytest.raises(ModelError, match="For the GGUF in it give"):
        models.load(str(tmp_path / "empty"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"x"'])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config.json is damaged"):
        models.load(str(folder))


def test_an_unknown_architecture_and_foreign_code(folder):
    edit(folder / "config.json", model_type="nonesuch")
    with pytest.raises(ModelError, match="nonesuch"):
        models.load(str(folder))
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match="code of its own, which lorakit does not run"):
        models.load(str(folder))


def test_a_truncated_weight_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"is damaged: model.safetensors"):
        models.load(str(folder))


def test_a_missing_shard_and_a_damaged_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"is damaged: model-00002-of-00002.safetensors"):
        models.load(str(folder))
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        models.load(str(folder))


def test_missing_tensors_are_not_drawn_at_random(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    for task in ("causal-lm", "feature-extraction"):
        with pytest.raises(ModelError, match=r"1 are missing.*layers\.1\.mlp\.up_proj\.weight"):
            models.load(str(folder), task=task)
    with pytest.raises(ModelError, match="1 are missing"):
        models.load(str(folder), task="sequence-classification", num_labels=2)


def test_tensors_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match=r"tiny"):
        models.load(str(folder))
    with pytest.raises(ModelError, match="another shape"):
        models.load(str(folder), task="sequence-classification", num_labels=2)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        models.load(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match=r"pytorch_model.bin.*pickle.*refused"):
        models.load(str(folder))


def test_an_adapters_folder(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter, not a base model"):
        models.load(str(folder))


def test_no_tokenizer_and_a_tokenizer_of_another_model(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for path in bare.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        models.load(str(bare))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzz"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"ids up to 5000.*do not belong together"):
        models.load(str(folder))


def test_a_tokenizer_with_nothing_to_pad_with(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="neither a pad nor an eos"):
        models.load(str(folder))
