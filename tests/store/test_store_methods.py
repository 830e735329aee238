"""lorakit's own folders: methods that PEFT does not have, and combinations, written, read back, and refused when damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from store_kit import CONFIG, EXTRA, TENSORS, edit_json, refused, snapshot
from torch import nn

import lorakit as lk
from lorakit.errors import FileError, UsageError
from lorakit.methods.adapter_drop import AdapterDrop
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lin import LinAdapter
from lorakit.methods.pfeiffer import PfeifferAdapter
from lorakit.methods.residual_adapter import ResidualAdapter

OWN: dict[str, Any] = {
    "full": FullFineTuning(),
    "top": FullFineTuning(top_layers=1),
    "bitfit": BitFit(),
    "houlsby": HoulsbyAdapter(r=3, activation="gelu"),
    "lin": LinAdapter(r=3),
    "pfeiffer": PfeifferAdapter(r=3),
    "adapter-drop": AdapterDrop(r=3, drop=1),
    "parallel": ResidualAdapter(),
    "series": ResidualAdapter(kind="series", r=2),
    "several": [lk.LoRA(r=2), HoulsbyAdapter(r=2)],
    "pissa": [lk.LoRA(r=2, init="pissa"), PfeifferAdapter(r=2)],
}


def shaken(model: nn.Module, name: str = "a") -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lk.parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return model


def saved(folder: Path, method: Any, model: nn.Module | None = None, **options: Any) -> Path:
    model = tiny.gpt2() if model is None else model
    lk.attach(model, method, name="a", seed=0, **options)
    return lk.save(shaken(model), folder, "a")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.batch(model)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", ["gpt2", "roberta", "bert", "deberta", "llama"])
def test_what_was_saved_comes_back_bit_for_bit(family: str, name: str, tmp_path: Path) -> None:
    if (family, name) == ("llama", "bitfit"):
        pytest.skip("Llama has no biases")
    model, other = tiny.MODELS[family](), tiny.MODELS[family]()
    folder = saved(tmp_path / "one", OWN[name], model)
    before = torch.get_rng_state()
    report = lk.load(other, folder, "b")
    assert torch.equal(torch.get_rng_state(), before)
    assert report.trainable == 0
    assert torch.equal(logits(other), logits(model))
    mine, theirs = lk.adapters(model)["a"], lk.adapters(other)["b"]
    assert set(mine.modules) == set(theirs.modules)
    if name != "pissa":  # whose pairs are written with what they took out of the base, twice as wide
        assert mine.parameters == theirs.parameters
    lk.save(other, tmp_path / "two", "b")
    assert files(folder) == files(tmp_path / "two")
    assert lk.verify(folder).ok
    assert lk.verify(folder, tiny.MODELS[family]()).ok
    assert not (folder / CONFIG).exists()
    found = lk.inspect(folder)
    assert found.faults == ()
    assert found.parameters == sum(
        tensor.numel() for path in folder.rglob(TENSORS) for tensor in load_file(path).values()
    )
    assert bool(found.replaced) == (name in ("full", "top", "bitfit"))


def test_a_loaded_one_can_be_trained_on_and_keeps_its_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", HoulsbyAdapter(r=3), dtype=torch.bfloat16)
    model = tiny.gpt2()
    report = lk.load(model, folder, trainable=True)
    assert report.trainable == sum(parameter.numel() for parameter in lk.parameters(model, "default"))
    assert {parameter.dtype for parameter in lk.parameters(model, "default")} == {torch.bfloat16}


def test_heads_are_in_the_file_and_in_each_part_that_trains_them(tmp_path: Path) -> None:
    head = ["classifier"]
    both = [lk.LoRA(r=2, modules_to_save=head), BitFit(modules_to_save=head)]
    folder = saved(tmp_path / "a", both, tiny.roberta())
    name = "classifier.out_proj.weight"
    lora = load_file(folder / "lora" / TENSORS)[f"base_model.model.{name}"]
    assert torch.equal(lora, load_file(folder / "bitfit" / TENSORS)[name])
    other = tiny.roberta()
    with torch.no_grad():
        other.classifier.out_proj.weight.normal_()  # a head is drawn anew with each base
    lk.load(other, folder)
    assert torch.equal(other.classifier.out_proj.weight, lora)
    tensors = load_file(folder / "bitfit" / TENSORS)
    save_file({**tensors, name: tensors[name] + 1}, folder / "bitfit" / TENSORS, metadata={"format": "pt"})
    for path in folder.rglob(EXTRA):
        edit_json(path, adapter=None)
    refused(folder, "classifier.out_proj.weight: two parts have it, with different values", model=tiny.roberta())


def test_a_part_of_a_combination_is_an_adapter_by_itself(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny.llama()
    folder = saved(tmp_path / "a", [lk.LoRA(r=2), HoulsbyAdapter(r=2)], model)
    alone = tiny.llama()
    lk.load(alone, folder / "lora")
    peft = PeftModel.from_pretrained(tiny.llama(), folder / "lora").eval()
    torch.testing.assert_close(logits(alone), peft(**tiny.batch(alone)).logits)
    lk.load(alone, folder / "houlsby", "h")
    with lk.use(alone, {"default": 1.0, "h": 1.0}):
        torch.testing.assert_close(logits(alone), logits(model))


def test_the_hash_is_of_the_method_and_its_tensors(tmp_path: Path) -> None:
    def identity(folder: Path) -> str:
        return str(json.loads((folder / EXTRA).read_text())["adapter"])

    one, same = saved(tmp_path / "1", PfeifferAdapter(r=3)), saved(tmp_path / "2", PfeifferAdapter(r=3))
    bent = saved(tmp_path / "3", PfeifferAdapter(r=3, activation="gelu"))
    drop = saved(tmp_path / "4", AdapterDrop(r=3))
    assert identity(one) == identity(same)
    assert len({identity(one), identity(bent), identity(drop)}) == 3


def test_what_stood_in_the_folder_in_another_layout_is_gone(tmp_path: Path) -> None:
    for method in (lk.LoRA(r=2), HoulsbyAdapter(r=2), [lk.LoRA(r=2), BitFit()], PfeifferAdapter(r=2), lk.LoRA(r=2)):
        folder = saved(tmp_path / "a", method)
        model = tiny.gpt2()
        lk.load(model, folder)
        found = lk.adapters(model)["default"].method
        assert found.name == ("several" if isinstance(method, list) else method.name)


def config(**changes: Any) -> Any:
    """Change the configuration in lorakit.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / EXTRA).read_text())
        found["config"].update(changes)
        (folder / EXTRA).write_text(json.dumps({**found, "adapter": None}))

    return change


def tensors(change: Any) -> Any:
    def edit(folder: Path) -> None:
        found = load_file(folder / TENSORS)
        change(found)
        save_file(found, folder / TENSORS, metadata={"format": "pt"})
        edit_json(folder / EXTRA, adapter=None)

    return edit


BIAS = "transformer.h.0.attn.c_proj:adapter.down_bias"
DAMAGE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unknown key": (config(rr=3), ("config.rr: unknown key, whose effect would be lost; did you mean 'r'?",)),
    "wrong value": (config(r="3"), ("r must be a whole number",)),
    "wrong activation": (config(activation={"a": 1}), ("activation must be one of",)),
    "huge rank": (config(r=10**9), ("expected [1000000000",) * 2 + ("expected [32, 1000000000]",)),
    "a rank that no tensor has": (config(r=10**400), ("r must be a whole number from 1 to 2147483647",)),
    "another rank": (
        config(r=4),
        ("expected [4, 32], got [3, 32]", "expected [4], got [3]", "expected [32, 4], got [32, 3]"),
    ),
    "no regular expression": (config(mlp="("), ("'(' is no regular expression",)),
    "deep regular expression": (config(mlp="(" * 20000), ("",)),
    "names no layer": (config(mlp=["c_pro"]), ("output projection of transformer.h.0's mlp is not known",)),
    "config is no object": (lambda f: edit_json(f / EXTRA, config=[1]), ("config: expected an object",)),
    "no config": (lambda f: edit_json(f / EXTRA, config=None), ("config: expected an object",)),
    "unknown method": (
        lambda f: edit_json(f / EXTRA, method="hulsby"),
        ("method 'hulsby' is none that this lorakit knows",),
    ),
    "method is a list": (lambda f: edit_json(f / EXTRA, method=["a"]), ("is none that this lorakit knows",)),
    "newer format": (lambda f: edit_json(f / EXTRA, format=99), ("format 99",)),
    "no JSON": (lambda f: (f / EXTRA).write_text("{"), ("lorakit.json: no JSON",)),
    "a list": (lambda f: (f / EXTRA).write_text("[]"), ("lorakit.json: expected a JSON object",)),
    "no lorakit.json": (
        lambda f: (f / EXTRA).unlink(),
        ("adapter_config.json: not there", "expected a key that begins with"),
    ),
    "no tensors": (lambda f: (f / TENSORS).unlink(), ("adapter_model.safetensors: not there",)),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), ("truncated",)),
    "pickle": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), ("a pickle",)),
    "missing": (
        tensors(lambda t: t.pop(BIAS)),
        (f"{BIAS}: the method has such a tensor on this model, and the file has none",),
    ),
    "too many": (tensors(lambda t: t.update(x=torch.ones(2))), ("x: in the file, but the method has no such tensor",)),
    "shape": (tensors(lambda t: t.update({BIAS: torch.ones(4)})), (f"{BIAS}: expected [3], got [4]",)),
    "whole numbers": (tensors(lambda t: t.update({BIAS: torch.ones(3).long()})), ("expected floating-point numbers",)),
    "not finite": (tensors(lambda t: t[BIAS].fill_(float("nan"))), ("not finite",)),
    "by hand": (
        lambda f: save_file(
            {key: tensor + 1 for key, tensor in load_file(f / TENSORS).items()}, f / TENSORS, metadata={"format": "pt"}
        ),
        ("names the hash",),
    ),
    "settings by hand": (lambda f: edit_json(f / EXTRA, config={"r": 3, "activation": "tanh"}), ("names the hash",)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_with_every_fault(case: str, tmp_path: Path) -> None:
    damage, wanted = DAMAGE[case]
    folder = saved(tmp_path / "a", HoulsbyAdapter(r=3))
    damage(folder)
    refused(folder, *wanted)


@pytest.mark.parametrize(
    "parts", [["lora", "../houlsby"], ["lora", "/tmp"], ["lora"], "lora", None, ["lora", 3], ["lora", "lora"]]
)
def test_the_parts_are_names_of_methods_alone(parts: object, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])
    edit_json(folder / EXTRA, parts=parts)
    faults = refused(folder, "parts:")
    assert len(faults) == 1


def test_a_combinations_parts_are_checked_each(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])
    shutil.rmtree(folder / "lora")
    refused(folder, "lora: ", "names the hash")
    folder = saved(tmp_path / "b", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])
    shutil.rmtree(folder / "lora")
    (folder / "houlsby").rename(folder / "lora")
    refused(folder, "lora: holds an adapter of another method, houlsby", "houlsby: ", "names the hash")
    folder = saved(tmp_path / "c", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])
    other = saved(tmp_path / "d", [lk.LoRA(r=2, alpha=3), HoulsbyAdapter(r=2)])
    shutil.copytree(other / "lora", folder / "lora", dirs_exist_ok=True)
    refused(folder, "names the hash")
    nested = saved(tmp_path / "e", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])
    shutil.rmtree(nested / "houlsby")
    shutil.copytree(other, nested / "houlsby")
    refused(
        nested,
        "houlsby: lorakit.json: method 'several' is none",
        "houlsby: adapter_model.safetensors",
        "names the hash",
    )


def test_another_base_or_another_shape_is_refused(tmp_path: Path) -> None:
    for name, method in (("one", HoulsbyAdapter(r=2)), ("two", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])):
        folder = saved(tmp_path / name, method)
        changed = tiny.gpt2()
        with torch.no_grad():
            changed.transformer.wpe.weight.add_(1)
        refused(folder, "trained on another base", model=changed)
        lk.load(changed, folder, check_base=False)
        wide = tiny.gpt2(n_embd=48)
        with pytest.raises(FileError, match="expected"):
            lk.load(wide, folder, check_base=False)
        with pytest.raises(FileError, match=r"no list of blocks|no such module|has none|not known"):
            lk.load(nn.Sequential(nn.Linear(3, 3)), folder, check_base=False)


def test_notes_go_beside_and_what_json_cannot_hold_leaves_the_old_files(tmp_path: Path) -> None:
    for name, method in (("one", BitFit()), ("two", [lk.LoRA(r=2), BitFit()])):
        model = tiny.gpt2()
        lk.attach(model, method, name="a", seed=0)
        folder = lk.save(model, tmp_path / name, "a", notes={"task": "causal-lm"})
        assert json.loads((folder / EXTRA).read_text())["task"] == "causal-lm"
        before = files(folder)
        with pytest.raises(UsageError, match="notes takes"):
            lk.save(shaken(model), folder, "a", notes={"x": object()})
        assert files(folder) == before


def test_a_combination_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.store import files as room

    folder = saved(tmp_path / "a", [lk.LoRA(r=2), HoulsbyAdapter(r=2)])
    before, flush, left = files(folder), room._flush, [5]

    def failing(path: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(room, "_flush", failing)
    with pytest.raises(lk.LorakitError, match="no space left"):
        saved(folder, [lk.LoRA(r=2, alpha=3), HoulsbyAdapter(r=2)])
    monkeypatch.undo()
    assert files(folder) == before


def test_loading_leaves_the_model_as_it_was_where_it_fails(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", HoulsbyAdapter(r=2))
    model = tiny.llama()
    before = snapshot(model)
    with pytest.raises(FileError):
        lk.load(model, folder)
    assert lk.adapters(model) == {}
    assert before[1:] == snapshot(model)[1:]


def test_a_method_of_ones_own_has_no_layout(tmp_path: Path) -> None:
    class Mine(HoulsbyAdapter):
        name = "mine"

    model = tiny.gpt2()
    lk.attach(model, Mine(r=2))
    with pytest.raises(UsageError, match="Mine, which has no folder layout"):
        lk.save(model, tmp_path / "a")
    lk.detach(model, "default")
    lk.attach(model, [lk.LoRA(r=2), Mine(r=2)])
    with pytest.raises(UsageError, match="no folder layout"):
        lk.save(model, tmp_path / "a")


def test_beside_adapters_that_are_on_already(tmp_path: Path) -> None:
    model, alone = tiny.gpt2(), tiny.gpt2()
    lk.attach(model, lk.LoRA(r=2), name="lora", seed=0)
    lk.attach(model, FullFineTuning(top_layers=1), name="top", seed=0)
    lk.use(model, {"lora": 1.0, "top": 1.0})
    for name, method in (("one", HoulsbyAdapter(r=2)), ("two", [lk.LoRA(r=2), BitFit()]), ("three", FullFineTuning())):
        folder = saved(tmp_path / name, method)
        lk.load(model, folder, name)
        lk.load(alone, folder, name)
        assert torch.equal(logits(model), logits(alone))
        assert files(lk.save(model, tmp_path / f"{name}-again", name)) == files(folder)


def test_programs_for_lora_say_what_they_were_given(tmp_path: Path) -> None:
    for name, method in (("houlsby", HoulsbyAdapter(r=2)), ("several", [lk.LoRA(r=2), BitFit()])):
        folder = saved(tmp_path / name, method)
        with pytest.raises(lk.LorakitError, match=f"the method is '{name}', where a LoRA adapter is expected"):
            lk.analyze(folder)
        with pytest.raises(FileError, match="only LoRA has a place in other programs' files"):
            lk.convert(folder, tmp_path / "out", to="kohya")


def test_a_base_that_was_changed_under_its_adapters_is_another_base(tmp_path: Path) -> None:
    """Also by the old way through `.data`, of which autograd's version knows nothing."""
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=2), name="a")
    folder = lk.save(model, tmp_path / "a", name="a")
    lk.load(model, folder, name="b")
    for parameter in model.model.embed_tokens.parameters():
        parameter.data.normal_()
    with pytest.raises(lk.LorakitError, match="trained on another base"):
        lk.load(model, folder, name="c")
