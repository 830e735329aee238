"""A full disk, a place that cannot be written, a save cut off half-way: one OutputError, and the old adapter intact."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import tiny
import torch
from store_kit import CONFIG, EXTRA, TENSORS, attached, good, refused

import lorakit as lk
from lorakit.errors import OutputError
from lorakit.store.files import write_atomically, write_bytes, write_json


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failing(number, calls=0):
    """A function that fails with `number` from its (calls + 1)-th call on, and does nothing before."""
    made = []

    def fail(*args, **kwargs):
        made.append(args)
        if len(made) > calls:
            raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_disk_that_is_full_at_any_flush_leaves_the_old_adapter(calls, tmp_path, monkeypatch):
    folder = good(tmp_path / "adapter")
    before = content(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC, calls))
        with pytest.raises(OutputError, match=r"no space left on the disk.*intact"):
            lk.save(attached(r=2), folder)
    assert content(folder) == before
    lk.load(tiny.gpt2(), folder)


def test_a_first_save_that_fails_leaves_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EDQUOT))
    with pytest.raises(OutputError, match="no space left"):
        lk.save(attached(), tmp_path / "adapter")
    assert content(tmp_path / "adapter") == {}


def test_the_first_rename_fails(tmp_path, monkeypatch):
    folder = good(tmp_path / "adapter")
    before = content(folder)
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"no space left on the disk.*intact"):
        lk.save(attached(r=2), folder)
    assert content(folder) == before


@pytest.mark.parametrize("old", ["lorakit", "peft", "none"])
@pytest.mark.parametrize("placed", [0, 1, 2, 3, 4])
def test_a_save_killed_between_two_files_is_never_a_mixture_without_a_word(placed, old, tmp_path, monkeypatch):
    """Ranks are equal and only alpha and the values differ: no shape would tell. PEFT's folder has no hash to compare."""
    folder = tmp_path / "adapter"
    if old != "none":
        good(folder)
    if old == "peft":
        (folder / EXTRA).unlink()
    before = content(folder) if old != "none" else {}
    replace, made = os.replace, []

    def killed(source, target):
        if len(made) == placed:
            raise KeyboardInterrupt
        made.append(target)
        replace(source, target)

    new = attached(alpha=16)
    with torch.no_grad():
        for parameter in lk.parameters(new, "default"):
            parameter.add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        if placed < 4:
            with pytest.raises(KeyboardInterrupt):
                lk.save(new, folder)
        else:
            lk.save(new, folder)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    if placed == 0:
        assert content(folder) == before
    if placed >= 3 or (placed == 0 and old != "none"):  # the README tells nothing that load reads
        model = tiny.gpt2()
        lk.load(model, folder)
        assert lk.adapters(model)["default"].method.alpha == (8 if placed == 0 else 16)
    elif old == "none":
        assert refused(folder, "not there")
    else:
        refused(folder, "a save cut off half-way")


def test_a_rename_that_fails_later_says_that_the_folder_is_mixed(tmp_path, monkeypatch):
    folder = good(tmp_path / "adapter")
    replace, made = os.replace, []

    def once(source, target):
        if made:
            raise OSError(errno.EIO, "Input/output error")
        made.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(OutputError, match=r"lorakit.json is already in place.*files of two saves"):
        lk.save(attached(alpha=16), folder)
    refused(folder, "a save cut off half-way")


def test_a_disk_that_really_is_full(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        folder = good(place / "adapter", r=2)
        before = content(folder)
        with pytest.raises(OutputError, match=r"no space left on the disk.*intact"):
            lk.save(attached(r=24, target_modules=["c_attn", "c_fc", "c_proj"]), folder)
        assert content(folder) == before
        lk.load(tiny.gpt2(), folder)
        from safetensors.torch import save_file

        with pytest.raises(OutputError, match="no space left"):  # what safetensors' own writer says then
            write_atomically(folder / "x", lambda path: save_file({"x": torch.ones(100_000)}, str(path)))
        assert content(folder) == before
    finally:
        subprocess.run(["umount", place], check=True)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/lorakit-test", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="cannot write"):
            lk.save(attached(), place)
    (tmp_path / "taken" / TENSORS).mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot write"):
        lk.save(attached(), tmp_path / "taken")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    folder = good(tmp_path / "adapter")
    before = content(folder)
    if os.geteuid() == 0:  # root may write anywhere: say what the system says to others
        monkeypatch.setattr(os, "open", failing(errno.EACCES))
    else:
        folder.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot write .*Permission denied.*intact"):
        lk.save(attached(r=2), folder)
    monkeypatch.undo()
    folder.chmod(0o700)
    assert content(folder) == before


def test_new_files_have_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        folder = good(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_save_over_another_adapter_and_other_files_leaves_those(tmp_path):
    folder = good(tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    lk.save(attached(r=2), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / CONFIG).read_text())["r"] == 2
    model = tiny.gpt2()
    lk.load(model, folder)
    lk.save(model, folder)  # over the very files that it came from
    lk.load(model, folder, name="again")


def test_the_writers_alone(tmp_path):
    write_bytes(tmp_path / "a" / "b", b"1")
    assert (tmp_path / "a" / "b").read_bytes() == b"1"
    with pytest.raises(lk.LorakitError, match=r"c\.json"):
        write_json(tmp_path / "c.json", {"x": float("inf")})

    def broken(path):
        path.write_bytes(b"half")
        raise RuntimeError("the writer itself")

    with pytest.raises(RuntimeError, match="the writer itself"):
        write_atomically(tmp_path / "a" / "b", broken)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b").read_bytes() == b"1"
