"""compress: the best approximation of each update, as a PEFT folder that PEFT and lorakit load, with its loss told."""

import json

import pytest
import tiny
import torch
from analyze_kit import adapter, dense, digest
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.analyze.api import analyze
from lorakit.analyze.compress import compress
from lorakit.analyze.ranks import by_bytes
from lorakit.errors import FileError, OutputError, UsageError
from lorakit.store.read import read_folder

VARIED = {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"0.self_attn.q_proj": 5}}


def truncated(delta: torch.Tensor, k: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :k] * s[:k] @ vh[:k]


@pytest.mark.parametrize("fields", [{}, VARIED, {"use_rslora": True, **VARIED}, {"alpha": 3}])
def test_a_fixed_rank_is_the_best_approximation(tmp_path, fields):
    source = adapter(tmp_path / "a", decay=0.7, **fields)
    report = compress(source, tmp_path / "b", rank=2)
    before, after = dense(source), dense(tmp_path / "b")
    assert set(before) == set(after)
    total = 0.0
    for layer in report.layers:
        best = truncated(before[layer.path], 2)
        torch.testing.assert_close(after[layer.path], best, rtol=0, atol=1e-6 * float(best.norm()))
        missing = float((after[layer.path] - before[layer.path]).norm())
        assert layer.error == pytest.approx(missing / float(before[layer.path].norm()), rel=1e-6)
        assert layer.energy == pytest.approx(1 - layer.error**2, abs=1e-6)
        assert layer.kept == 2
        total += missing**2
    whole = sum(float(delta.norm()) ** 2 for delta in before.values())
    assert report.error == pytest.approx((total / whole) ** 0.5, rel=1e-6)
    assert report.verdict == "lossy"


def test_full_rank_returns_the_same_update(tmp_path):
    source = adapter(tmp_path / "a", **VARIED)
    for number, how in enumerate(({"rank": 6}, {"energy": 1.0}, {"bytes": 10**9})):
        report = compress(source, tmp_path / f"b{number}", **how)
        assert report.verdict == "unchanged"
        assert report.error == 0
        for path, delta in dense(tmp_path / f"b{number}").items():
            assert float((delta - dense(source)[path]).norm() / delta.norm()) <= 1e-6
        same = load_file(tmp_path / f"b{number}" / "adapter_model.safetensors")
        assert all(torch.equal(same[key], own) for key, own in load_file(source / "adapter_model.safetensors").items())


def test_ranks_that_are_not_used_go_and_nothing_is_lost(tmp_path):
    """An adapter of rank 2 made by hand, stored in rank 4: compressed to 2, the same to 1e-6, and not called untouched."""
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=4, alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
            if "lora_A" in name:
                parameter[2:] = torch.randn(2, 2) @ parameter[:2]
    source = lk.save(model, tmp_path / "a")
    report = compress(source, tmp_path / "b", energy=1.0)
    assert [layer.kept for layer in report.layers] == [2] * 4
    assert report.verdict == "exact to rounding"
    for path, delta in dense(tmp_path / "b").items():
        assert float((delta - dense(source)[path]).norm() / delta.norm()) <= 1e-6
    assert report.bytes_after == (tmp_path / "b" / "adapter_model.safetensors").stat().st_size < report.bytes_before


def test_energy_gives_each_layer_its_own_rank(tmp_path):
    source = adapter(tmp_path / "a", decay=0.5, r=6, rank_pattern={"1.self_attn.v_proj": 1})
    report = compress(source, tmp_path / "b", energy=0.95)
    for layer in report.layers:
        squares = torch.linalg.svdvals(dense(source)[layer.path]).square().cumsum(0)
        enough = squares / squares[-1] >= 0.95
        assert layer.kept == 1 + int((~enough).sum())
        assert layer.energy >= 0.95
    found = read_folder(tmp_path / "b")
    assert not found.faults
    assert {path: found.method.rank(path) for path in found.parsed.pairs} == {
        one.path: one.kept for one in report.layers
    }


def test_bytes_are_kept_to_and_spent_where_they_are_worth_most(tmp_path):
    source = adapter(tmp_path / "a", decay=0.6, r=6, target_modules=["q_proj", "down_proj"])
    size = (source / "adapter_model.safetensors").stat().st_size
    last = 2.0
    for share in (0.5, 0.65, 0.8):
        budget = int(size * share)
        report = compress(source, tmp_path / f"{share}", bytes=budget)
        written = (tmp_path / f"{share}" / "adapter_model.safetensors").stat().st_size
        assert written == report.bytes_after <= budget
        assert written > budget - 400  # no direction fits any more
        assert report.error < last
        last = report.error
    kept = {one.path: one.kept for one in report.layers}
    values = {path: torch.linalg.svdvals(delta) for path, delta in dense(source).items()}
    worth = {path: 1 / sum(delta.shape) for path, delta in dense(source).items()}
    lowest = min(float(values[path][kept[path] - 1]) ** 2 * worth[path] for path in kept if kept[path] > 1)
    fitting = [path for path in kept if kept[path] < 6]
    assert all(float(values[path][kept[path]]) ** 2 * worth[path] <= lowest * 1.5 for path in fitting)


def test_a_dear_direction_must_be_worth_its_bytes():
    """Values 3 for 10 bytes against 2 for 1: 9/10 a byte against 4/1, so that the cheap ones come first."""
    values = [torch.tensor([5.0, 3.0]), torch.tensor([5.0, 2.0, 2.0])]
    assert by_bytes(values, [10, 1], budget=13, least=0) == [1, 3]
    assert by_bytes(values, [10, 1], budget=23, least=0) == [2, 3]
    assert by_bytes(values, [10, 1], budget=11, least=0) == [1, 1]
    falling = [torch.tensor([5.0, 4.0, 3.0]), torch.tensor([5.0, 1.2])]
    assert by_bytes(falling, [10, 1], budget=31, least=0) == [2, 2]


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_peft_loads_it_with_equal_logits(tmp_path, family):
    from peft import PeftModel

    build, fields = tiny.MODELS[family], {"target_modules": ["c_attn", "c_fc"]}
    if family == "roberta":
        fields = {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"], "bias": "lora_only"}
    source = adapter(tmp_path / "a", build(), decay=0.3, **fields)
    compress(source, tmp_path / "b", energy=0.9)
    ours = build()
    lk.load(ours, tmp_path / "b")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "b").eval()
    inputs = tiny.batch(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
    kept = {key: one for key, one in load_file(source / "adapter_model.safetensors").items() if "lora_" not in key}
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert bool(kept) == (family == "roberta")
    assert all(torch.equal(written[key], one) for key, one in kept.items())


def test_convolutions_and_embeddings(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 5, 1))
    source = adapter(tmp_path / "c", model, target_modules=["0", "1"])
    compress(source, tmp_path / "d", rank=2)
    for path, delta in dense(tmp_path / "d").items():
        torch.testing.assert_close(delta, truncated(dense(source)[path], 2), rtol=1e-5, atol=1e-5)
    lk.load(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 5, 1)), tmp_path / "d", check_base=False)
    source = adapter(tmp_path / "e", tiny.gpt2(), target_modules=["wte"])
    compress(source, tmp_path / "f", rank=1)
    lk.load(tiny.gpt2(), tmp_path / "f")
    assert analyze(tmp_path / "f").modules[0].numerical_rank == 1


def test_types_are_kept_and_rounding_is_a_loss(tmp_path):
    model = tiny.llama().bfloat16()
    lk.attach(model, lk.LoRA(r=4, target_modules=["q_proj"]), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.normal_()
            if parameter.shape[0] == 4:
                parameter[3] = parameter[2]  # rank 3 at most
    source = lk.save(model, tmp_path / "a")
    report = compress(source, tmp_path / "b", energy=1.0)
    assert {one.dtype for one in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert [layer.kept for layer in report.layers] == [3, 3]
    assert report.verdict == "lossy"  # the new factors were rounded to 8 bits again
    assert 1e-4 < report.error < 1e-2


def test_the_split_is_symmetric_and_a_zero_update_stays_trainable(tmp_path):
    compress(adapter(tmp_path / "a"), tmp_path / "b", rank=2)
    for halves in read_folder(tmp_path / "b").parsed.pairs.values():
        torch.testing.assert_close(halves[0].norm(dim=1), halves[1].norm(dim=0))
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=4, target_modules=["q_proj"]))
    report = compress(lk.save(model, tmp_path / "z"), tmp_path / "y", rank=2)
    assert report.error == 0
    assert all(float(halves[0].norm()) > 0 for halves in read_folder(tmp_path / "y").parsed.pairs.values())


def test_the_source_stays_and_the_notes_say_where_it_came_from(tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.normal_()
    source = lk.save(model, tmp_path / "a", notes={"metrics": {"accuracy": 0.9}, "task": "causal-lm"})
    before = digest(source)
    report = compress(source, tmp_path / "b", rank=1)
    assert digest(source) == before
    old, new = (json.loads((folder / "lorakit.json").read_text()) for folder in (source, tmp_path / "b"))
    assert new["compressed"]["from"] == {"adapter": old["adapter"], "metrics": {"accuracy": 0.9}}
    assert new["compressed"]["error"] == report.error
    assert "metrics" not in new  # they were measured on another adapter
    assert new["base"] == old["base"]
    assert new["task"] == "causal-lm"
    assert not lk.verify(tmp_path / "b", tiny.llama()).faults


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "one of energy, rank and bytes"),
        ({"rank": 2, "energy": 0.9}, "one of energy, rank and bytes"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.5}, "whole number"),
        ({"rank": 5}, "highest rank is 4"),
        ({"energy": 0.0}, "at most 1"),
        ({"energy": 99}, "at most 1"),
        ({"energy": float("nan")}, "at most 1"),
        ({"bytes": 100}, "too few"),
        ({"bytes": -1}, "at least 1"),
    ],
)
def test_wrong_options(tmp_path, how, said):
    source = adapter(tmp_path / "a")
    with pytest.raises(UsageError, match=said):
        compress(source, tmp_path / "b", **how)
    assert not (tmp_path / "b").exists()


def test_dora_and_others_are_refused_by_name(tmp_path):
    cases = [
        (tiny.llama(), {"use_dora": True}, "DoRA"),
        (torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2)), {"target_modules": ["0"]}, "grouped convolution"),
        (tiny.gpt2(), {"target_modules": ["wte"], "ensure_weight_tying": True}, "ensure_weight_tying"),
        (torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)), {"target_modules": ["0"]}, "attention layer"),
    ]
    for number, (model, fields, said) in enumerate(cases):
        source = adapter(tmp_path / str(number), model, **fields)
        with pytest.raises(UsageError, match=said):
            compress(source, tmp_path / "out", rank=2)
        assert not (tmp_path / "out").exists()
    notes = analyze(tmp_path / "0").notes
    assert any("DoRA" in note for note in notes)


def test_places_that_are_taken(tmp_path):
    source = adapter(tmp_path / "a")
    with pytest.raises(OutputError, match="where the source is"):
        compress(source, source, rank=2, overwrite=True)
    compress(source, tmp_path / "b", rank=2)
    with pytest.raises(OutputError, match="--overwrite"):
        compress(source, tmp_path / "b", rank=1)
    assert compress(source, tmp_path / "b", rank=1, overwrite=True).layers[0].kept == 1


def test_a_damaged_source_is_refused_with_every_fault(tmp_path):
    source = adapter(tmp_path / "a")
    tensors = load_file(source / "adapter_model.safetensors")
    first, second = sorted(tensors)[:2]
    tensors[first][0, 0] = float("nan")
    tensors[second][0, 0] = float("inf")
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError) as caught:
        compress(source, tmp_path / "b", rank=2)
    assert sum("not finite" in fault for fault in caught.value.faults) == 2
    assert not (tmp_path / "b").exists()


def test_an_adapter_whose_base_was_changed_with_it_is_refused(tmp_path):
    source = adapter(tmp_path / "a")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    (source / "lorakit.json").unlink()
    with pytest.raises(UsageError, match=r"lorakit\.save"):
        compress(source, tmp_path / "b", rank=2)
