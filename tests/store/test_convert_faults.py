"""Sources that are damaged, foreign or malicious, and targets that are taken: one clear error each, nothing written."""

import pickle
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.errors import FileError, ModelError, OutputError, UsageError
from lorakit.store.convert import FORMATS, convert, read_any

PAIR = {"q.lora_A": torch.randn(2, 4), "q.lora_B": torch.randn(4, 2)}


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def refused(source, match, **options):
    target = Path(source).parent / "out"
    with pytest.raises(FileError, match=match):
        convert(source, target, **options)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code(tmp_path, zipped):
    path = tmp_path / "a.bin"
    content = PAIR | {"x": Trap(tmp_path / "sprung")}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"x": Trap(tmp_path / "sprung")}, protocol=2))
    refused(path, "refused", alpha=2)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "a.gguf"])
@pytest.mark.parametrize("part", [0, 3, 0.2, 0.5, 0.9])
def test_truncated(tmp_path, name, part):
    path = tmp_path / name
    if name == "a.bin":
        torch.save(PAIR, path)
    elif name == "a.safetensors":
        save_file({f"unet.mid_block.{key}.weight": value for key, value in PAIR.items()}, path)
    else:
        model = tiny.llama()
        lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj"]))
        convert(lk.save(model, tmp_path / "start"), path, to="gguf", base=tiny.llama())
    data = path.read_bytes()
    path.write_bytes(data[: part if isinstance(part, int) else int(len(data) * part)])
    refused(path, "a\\.(bin|safetensors|gguf)", alpha=2)


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "a.gguf"])
def test_a_web_page(tmp_path, name):
    (tmp_path / name).write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    refused(tmp_path / name, "web page")


def test_other_things_in_a_pickle(tmp_path):
    for i, (content, match) in enumerate(
        [
            ([1, 2], "a list"),
            ({}, "nothing"),
            (torch.ones(2), "Tensor"),
            ({"a.lora_A": "text"}, "a str"),
            ({3: torch.ones(1)}, "3"),
        ]
    ):
        torch.save(content, tmp_path / f"{i}.bin")
        refused(tmp_path / f"{i}.bin", match, alpha=1)


def test_a_view_that_claims_more_than_the_file_holds(tmp_path):
    torch.save({"q.lora_A": torch.zeros(1).expand(2, 10**9), "q.lora_B": torch.zeros(4, 2)}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "more than the whole file", alpha=1)


def test_a_file_of_no_known_kind(tmp_path):
    save_file({"model.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert all(name in str(caught.value) for name in FORMATS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q.lora_B": None}, "lora_B is missing"),
        ({"q.lora_A": torch.randn(3, 4)}, "no pair"),
        ({"q.lora_A": torch.full((2, 4), float("nan"))}, "not finite"),
        ({"q.lora_A": torch.randn(2, 4, 1)}, "no pair"),
        ({"q.lora_A": torch.ones(2, 4, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_pairs_that_are_none(tmp_path, change, match):
    torch.save({key: value for key, value in (PAIR | change).items() if value is not None}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", match, alpha=1)


def test_every_fault_is_told_at_once(tmp_path):
    torch.save({"q.lora_A": torch.randn(2, 4), "v.lora_B": torch.randn(2, 4), "k.x": torch.ones(1)}, tmp_path / "a.bin")
    with pytest.raises(FileError) as caught:
        convert(tmp_path / "a.bin", tmp_path / "out")
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    "change", [{"r": 0}, {"r": "8"}, {"peft_type": "IA3"}, {"rank_pattern": {"(": 2}}, {"lora_alpha": None}, {"r": 3}]
)
def test_a_peft_folder_with_a_wrong_configuration(tmp_path, change):
    import json

    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=2, target_modules=["c_attn"]))
    folder = lk.save(model, tmp_path / "start")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(folder, "start")


def test_an_old_peft_folder_with_a_pickle(tmp_path):
    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=2, target_modules=["c_attn"]))
    folder = lk.save(model, tmp_path / "start")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(FileError):
        lk.load(tiny.gpt2(), folder)
    convert(folder, tmp_path / "new")
    again = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    lk.load(tiny.gpt2(), tmp_path / "new")
    (folder / "adapter_config.json").unlink()
    refused(folder, "--alpha")
    config, _, _ = read_any(folder, alpha=8)
    assert (config["r"], config["lora_alpha"]) == (2, 8)


def test_targets_that_are_taken(tmp_path):
    torch.save(PAIR, tmp_path / "a.bin")
    convert(tmp_path / "a.bin", tmp_path / "out", alpha=1)
    with pytest.raises(OutputError, match="--overwrite"):
        convert(tmp_path / "a.bin", tmp_path / "out", alpha=1)
    convert(tmp_path / "a.bin", tmp_path / "out", alpha=2, overwrite=True)
    assert read_any(tmp_path / "out")[0]["lora_alpha"] == 2
    for to, target in (("loralib", tmp_path / "a.bin"), ("peft", tmp_path)):
        with pytest.raises(OutputError, match="where the source is"):
            convert(tmp_path / "a.bin", target, to=to, alpha=1, overwrite=True)


@pytest.mark.parametrize(
    "options",
    [{"to": "onnx"}, {"alpha": 0.0}, {"alpha": float("nan")}, {"enable_lora": (False,)}],
)
def test_wrong_arguments(tmp_path, options):
    torch.save(PAIR, tmp_path / "a.bin")
    with pytest.raises(UsageError):
        convert(tmp_path / "a.bin", tmp_path / "out", **options)


def test_a_base_that_is_none(tmp_path):
    torch.save(PAIR, tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"config\.json"):
        convert(tmp_path / "a.bin", tmp_path / "out", alpha=1, base=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense", "architectures": ["NoSuchModel"]}')
    with pytest.raises(ModelError):
        convert(tmp_path / "a.bin", tmp_path / "out", alpha=1, base=tmp_path)


def test_a_wrong_ending(tmp_path):
    torch.save(PAIR, tmp_path / "a.bin")
    with pytest.raises(OutputError, match=r"\.safetensors"):
        convert(tmp_path / "a.bin", tmp_path / "b.txt", to="loralib", alpha=1)
    with pytest.raises(FileError, match="folder"):
        convert(tmp_path / "a.bin", tmp_path / "b.safetensors", alpha=1)


@pytest.mark.parametrize(
    "notes",
    [3, {"from": "loralib", "merged": 3}, {"from": "loralib", "merged": {"q": [2]}}, {"names": {"a": 1}}, {"model": ["x"]},
     {"alphas": {"q": ["torch.load", 0]}}, {"unknown": 1}],
)  # fmt: skip
def test_notes_changed_by_hand(tmp_path, notes):
    import json

    torch.save(PAIR, tmp_path / "a.bin")
    convert(tmp_path / "a.bin", tmp_path / "peft", alpha=1)
    path = tmp_path / "peft" / "lorakit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"converted": notes}))
    refused(tmp_path / "peft", "converted")


@pytest.mark.parametrize(
    "settings",
    ["[]", "no JSON", '{"unet.r": "x", "unet.lora_alpha": 2, "unet.target_modules": ["q"]}', '{"unet.r": 2}',
     '{"unet.r": 2, "unet.lora_alpha": NaN, "unet.target_modules": ["q"]}'],
)  # fmt: skip
def test_settings_in_a_header_that_make_no_sense(tmp_path, settings):
    tensors = {"unet.q.lora_A.weight": torch.ones(2, 4), "unet.q.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    refused(tmp_path / "a.safetensors", "a.safetensors")


def test_trained_heads_have_no_place_in_kohyas_file(tmp_path):
    model = tiny.roberta()
    lk.attach(model, lk.LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    with pytest.raises(FileError) as caught:
        convert(lk.save(model, tmp_path / "start"), tmp_path / "k.safetensors", to="kohya")
    told = "\n".join(caught.value.faults)
    assert all(
        f"classifier.{name}" in told for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    )
    assert not (tmp_path / "k.safetensors").exists()
