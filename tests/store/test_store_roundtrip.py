"""save -> load is exact; an adapter's identity and its base's fingerprint change when, and only when, they should."""

import hashlib
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from store_kit import CONFIG, EXTRA, PAIR, TENSORS, attached, edit_json, edit_tensors, good, refused

import lorakit as lk
from lorakit.store.identity import content_hash, fingerprint, same_base
from lorakit.store.peft_config import DEFAULTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def identity(folder):
    return json.loads((folder / EXTRA).read_text())["adapter"]


def bits(folder):
    return {key: (t.dtype, t.shape, t.contiguous().view(torch.uint8)) for key, t in load_file(folder / TENSORS).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_and_the_dtype_survive(dtype, tmp_path):
    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=4, target_modules=["c_attn", "wte"]), dtype=dtype)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.normal_()
    lk.save(model, tmp_path / "a")
    again = tiny.gpt2()
    lk.load(again, tmp_path / "a")
    lk.save(again, tmp_path / "b")
    first, second = bits(tmp_path / "a"), bits(tmp_path / "b")
    assert {entry[0] for entry in first.values()} == {dtype}
    assert first.keys() == second.keys()
    assert all(first[key][:2] == second[key][:2] and torch.equal(first[key][2], second[key][2]) for key in first)
    for file in (TENSORS, CONFIG, EXTRA, "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_tensors_are_in_memory_of_their_own(tmp_path):
    folder = good(tmp_path)
    model = tiny.gpt2()
    lk.load(model, folder)
    inputs = tiny.batch(model)
    before = model(**inputs).logits
    size = (folder / TENSORS).stat().st_size
    with open(folder / TENSORS, "r+b") as file:  # as a program would that writes the file in place
        file.write(b"\x00" * size)
    assert torch.equal(model(**inputs).logits, before)


def test_loading_switches_the_adapter_on_and_frozen_or_trainable_as_asked(tmp_path):
    folder = good(tmp_path)
    frozen, trained = tiny.gpt2(), tiny.gpt2()
    lk.load(frozen, folder, name="a")
    lk.load(trained, folder, name="a", trainable=True)
    assert lk.adapters(frozen)["a"].active
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert sum(p.numel() for p in lk.parameters(trained, "a")) == lk.adapters(frozen)["a"].parameters


def test_two_saves_of_one_adapter_are_the_same_bytes(tmp_path):
    good(tmp_path / "a")
    good(tmp_path / "b")
    for file in (TENSORS, CONFIG, EXTRA):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_name_that_is_taken_is_refused_before_the_file_is_read(tmp_path):
    model = attached()
    with pytest.raises(lk.LorakitError, match="attached already"):
        lk.load(model, tmp_path / "nowhere")


# -- identity -------------------------------------------------------------------------------------------------------


def test_any_bit_of_any_tensor_changes_the_hash():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    seen = {content_hash(DEFAULTS, tensors)}
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).flatten()
        for byte in range(raw.numel()):
            for bit in range(8):
                raw[byte] ^= 1 << bit
                seen.add(content_hash(DEFAULTS, tensors))
                raw[byte] ^= 1 << bit
        assert name in tensors
    assert len(seen) == 1 + 8 * (24 + 6)
    shaped = tensors | {"a": tensors["a"].view(3, 2)}
    renamed = {"c": tensors["a"], "b": tensors["b"]}
    typed = tensors | {"b": tensors["b"].view(torch.float16)}
    assert len(seen | {content_hash(DEFAULTS, other) for other in (shaped, renamed, typed)}) == len(seen) + 3


def test_the_hash_ignores_who_wrote_it_and_where_and_what_is_default_anyway():
    tensors = {"a": torch.ones(2)}
    config = DEFAULTS | {"target_modules": ["q", "v"], "r": 4}
    reference = content_hash(config, tensors)
    for change in (
        {"peft_version": "9.9"},
        {"base_model_name_or_path": "/somewhere/else"},
        {"revision": "abc"},
        {"inference_mode": False},
        {"auto_mapping": {"x": 1}},
        {"target_modules": ["v", "q"]},
        {"a_key_of_next_year": None},
    ):
        assert content_hash(config | change, tensors) == reference, change
    least = {"peft_type": "LORA", "target_modules": ["q", "v"], "r": 4}
    assert content_hash(least, tensors) == reference
    for change in ({"r": 8}, {"lora_alpha": 9}, {"target_modules": ["q"]}, {"use_rslora": True}, {"bias": "all"}):
        assert content_hash(config | change, tensors) != reference, change


@pytest.mark.parametrize("lump", [1, 100, 8 << 20])
def test_the_hash_is_of_the_pieces_one_behind_the_other_whatever_is_hashed_in_one_go(monkeypatch, lump):
    monkeypatch.setattr("lorakit.store.identity.LUMP", lump)
    tensors = {"b": torch.arange(60.0).view(6, 10), "a": torch.arange(3, dtype=torch.int8), "c": torch.empty(0, 2)}
    said = {"r": 3, "target_modules": ["q", "v"]}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in "abc":
        one = tensors[name]
        digest.update(f"{name}|{one.dtype}|{tuple(one.shape)}|".encode() + one.numpy().tobytes())
    assert content_hash(said, tensors) == f"sha256:{digest.hexdigest()}"


def test_the_hash_in_lorakit_json_is_the_contents_and_another_adapters_is_refused(tmp_path):
    folder = good(tmp_path / "a")
    assert identity(folder) == content_hash(json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS))
    other = good(tmp_path / "b", r=2)
    (folder / EXTRA).write_bytes((other / EXTRA).read_bytes())
    refused(folder, "names the hash")


def test_notes_stand_in_lorakit_json_and_survive_the_next_save(tmp_path):
    lk.save(attached(), tmp_path / "a", notes={"metrics": {"loss": 0.5, "note": "x"}, "data": {"rows": 3}})
    model = tiny.gpt2()
    lk.load(model, tmp_path / "a")
    lk.save(model, tmp_path / "b", notes={"data": {"rows": 4}})
    first, second = (json.loads((tmp_path / name / EXTRA).read_text()) for name in "ab")
    assert first["metrics"] == second["metrics"] == {"loss": 0.5, "note": "x"}
    assert (first["data"], second["data"]) == ({"rows": 3}, {"rows": 4})
    assert first["adapter"] == second["adapter"]
    assert "loss 0.5" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("notes", [{"loss": float("nan")}, {"loss": torch.tensor(1.0)}, {"metrics": {1: 2, "a": 3}}])
def test_notes_that_json_cannot_hold_are_refused_before_anything_is_written(notes, tmp_path):
    with pytest.raises(lk.LorakitError, match="notes"):
        lk.save(attached(), tmp_path / "a", notes=notes)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("metrics", [None, "good", [1], {"a": None}, {"a": True, "b": {"c": 1}}])
def test_foreign_notes_do_not_stop_a_save(metrics, tmp_path):
    folder = good(tmp_path / "a")
    edit_json(folder / EXTRA, metrics=metrics)
    model = tiny.gpt2()
    lk.load(model, folder)
    lk.save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / EXTRA).read_text())["metrics"] == metrics


# -- the base -------------------------------------------------------------------------------------------------------


def other_seed():
    model = tiny.gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


def test_a_fingerprint_tells_bases_apart_and_copies_together():
    reference = fingerprint(tiny.gpt2())
    assert fingerprint(tiny.gpt2()) == reference
    assert fingerprint(tiny.gpt2().to(torch.bfloat16)) == reference
    assert fingerprint(other_seed()) != reference
    assert fingerprint(tiny.gpt2(n_layer=1)) != reference
    resized = tiny.gpt2()
    resized.resize_token_embeddings(100, mean_resizing=False)
    assert fingerprint(resized) != reference
    assert fingerprint(tiny.gpt2().to("meta")) is None


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_of_the_base_in_another_precision_is_the_same_base(tmp_path, copy):
    folder = good(tmp_path)
    lk.load(tiny.gpt2().to(copy), folder)
    assert same_base(fingerprint(tiny.gpt2().half()), fingerprint(tiny.gpt2().bfloat16()))
    assert not same_base(fingerprint(tiny.gpt2().half()), fingerprint(other_seed()))
    for broken in (None, 3, "base", "base:a:b", fingerprint(tiny.gpt2())[:-7], fingerprint(tiny.gpt2()) + "=="):
        assert not same_base(broken, fingerprint(tiny.gpt2()))


def test_a_fingerprint_is_the_bases_whatever_is_attached():
    reference = fingerprint(tiny.gpt2())
    model = attached()
    assert fingerprint(model) == reference
    lk.attach(model, lk.LoRA(r=2, target_modules=["c_fc"], modules_to_save=["ln_f"]), name="b")
    lk.use(model, {"default": 0.5, "b": 1.0})
    assert fingerprint(model) == reference


def test_a_changed_value_in_any_parameter_is_seen():
    for name, _ in tiny.gpt2().named_parameters():
        model = tiny.gpt2()
        with torch.no_grad():
            dict(model.named_parameters())[name].flatten()[0] += 1.0
        assert fingerprint(model) != fingerprint(tiny.gpt2()), name


def test_another_base_is_refused_unless_told_otherwise(tmp_path):
    folder = good(tmp_path)
    refused(folder, "trained on another base", model=other_seed())
    lk.load(other_seed(), folder, check_base=False)
    lk.load(tiny.gpt2().to(torch.bfloat16), folder)
    (folder / EXTRA).unlink()  # a PEFT folder says nothing of its base
    lk.load(other_seed(), folder)


def test_a_fresh_head_is_no_other_base(tmp_path):
    model = attached(tiny.roberta(), target_modules=["query"], modules_to_save=["classifier"])
    lk.save(model, tmp_path)
    base = tiny.roberta()
    with torch.no_grad():
        base.classifier.out_proj.weight.normal_()  # a head is drawn anew each time that a pre-trained encoder is loaded
    lk.load(base, tmp_path)
    inputs = tiny.batch(base)
    torch.testing.assert_close(base(**inputs).logits, model(**inputs).logits)


def test_two_faults_at_once_are_both_told_and_so_is_the_wrong_base(tmp_path):
    folder = good(tmp_path)
    extra = (folder / EXTRA).read_text()
    tensors = edit_tensors(folder)
    edit_tensors(folder, add={PAIR + ".lora_A.weight": tensors[PAIR + ".lora_A.weight"] / 0.0})
    (folder / EXTRA).write_text(extra)
    refused(folder, "not finite", "names the hash", "another base", model=other_seed())


def test_bias_and_buffers(tmp_path):
    """A parameter of the root module keeps its name; a buffer that differs from the model's is no silent loss."""

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.bias = torch.nn.Parameter(torch.zeros(3))
            self.layer = torch.nn.Linear(3, 3)
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.layer(x)) + self.bias

    model = attached(Root(), r=2, target_modules=["layer"], bias="lora_only", modules_to_save=["norm"])
    lk.save(model, tmp_path)
    lk.load(Root(), tmp_path)
    key = "base_model.model.norm.running_mean"
    edit_tensors(tmp_path, add={key: torch.zeros(3)})
    lk.load(Root(), tmp_path)
    edit_tensors(tmp_path, add={key: torch.ones(3)})
    refused(tmp_path, "norm.running_mean: differs from the model's buffer", model=Root())


def test_a_parameter_of_the_root_module_has_pefts_key(tmp_path):
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(3))
            self.layer = torch.nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.layer(x) + self.bias

    from lorakit.attach.method import Draft
    from lorakit.store.peft_folder import to_tensors

    assert list(to_tensors(Draft(replaced={"": {"bias": torch.ones(3)}}), Root(), lk.LoRA())) == [
        "base_model.model.bias"
    ]


def test_the_meta_device_holds_no_values_to_load_or_save(tmp_path):
    folder = good(tmp_path / "a")
    model = tiny.gpt2().to("meta")
    with pytest.raises(lk.LorakitError, match="meta device"):
        lk.load(model, folder)
    assert lk.adapters(model) == {}
    lk.attach(model, lk.LoRA(r=2, target_modules=["c_attn"]))
    with pytest.raises(lk.LorakitError, match="meta device"):
        lk.save(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
