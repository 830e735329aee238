"""The registry: names are names, versions stay, every change is whole."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from serve_app_kit import adapter_folder, hash_of

from lorakit.errors import FileError, LorakitError, OutputError, UnknownAdapterError, UsageError
from lorakit.serve.intake import AdapterBounds
from lorakit.serve.registry import Registry
from lorakit.serve.registry_state import KEPT_EVENTS, Entry


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("made")
    return [adapter_folder(root / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


def test_publish_roll_back_and_history(registry, made):
    first, second = (registry.publish("sql", folder) for folder in made[:2])
    assert [first.hash, second.hash] == [hash_of(folder) for folder in made[:2]]
    assert registry.resolve("sql") == second
    assert registry.resolve(f"sql@{first.hash.removeprefix('sha256:')[:8]}") == first
    assert registry.resolve(f"sql@{first.hash}") == first
    assert registry.roll_back("sql") == first
    assert registry.resolve("sql") == first
    with pytest.raises(UsageError, match="no version before"):
        registry.roll_back("sql")
    assert registry.roll_back("sql", second.hash) == second
    history = registry.entries()["sql"].history
    assert [event.action for event in history] == ["publish", "publish", "roll back", "roll back"]
    again = Registry(registry.folder)
    assert again.entries() == registry.entries()
    assert (second.folder / "adapter_model.safetensors").read_bytes() == (
        made[1] / "adapter_model.safetensors"
    ).read_bytes()


def test_rolling_back_leads_to_what_the_publication_replaced(registry, made, tmp_path):
    folders = [*made, adapter_folder(tmp_path / "3", seed=3)]
    hashes = [hash_of(folder) for folder in folders]

    def publish(number):
        assert registry.publish("sql", folders[number]).hash == hashes[number]

    def back(version=None):
        return hashes.index(registry.roll_back("sql", version).hash)

    for number in range(3):
        publish(number)
    assert back() == 1
    publish(3)
    registry.put_in_service("sql", False)
    registry.put_in_service("sql", True)
    registry = Registry(registry.folder)
    assert back() == 1  # and not 2, which was rolled back from
    assert back() == 0
    with pytest.raises(UsageError, match="no version before"):
        back()
    assert back(hashes[3]) == 3
    assert back() == 1  # what 3 replaced
    publish(0)
    publish(0)
    assert [back(), back()] == [1, 0]
    with pytest.raises(UsageError, match="no version before"):
        back()


def test_a_long_history_and_none_lead_back_too():
    versions = tuple(f"{number:064x}" for number in range(300))
    entry = Entry(versions[:1], versions[0]).after("publish")
    for at in range(1, 300):
        entry = entry.after("publish", versions=versions[: at + 1], current=versions[at])
    assert len(entry.history) == KEPT_EVENTS
    for at in range(298, -1, -1):
        assert entry.before == versions[at]
        entry = entry.after("roll back", current=versions[at])
    assert entry.before is None
    assert Entry(versions[:3], versions[2]).before == versions[1]
    assert Entry(versions[:3], versions[0]).before is None


def test_unload_load_pin_and_aliases(registry, made):
    registry.publish("sql", made[0])
    registry.alias("prod", "sql")
    registry.alias("old", f"sql@{hash_of(made[0])}")
    second = registry.publish("sql", made[1])
    assert registry.resolve("prod") == second
    assert registry.resolve("old").hash == hash_of(made[0])
    registry.pin("sql")
    registry.put_in_service("sql", False)
    for reference in ("sql", "prod", "old", f"sql@{second.hash}"):
        with pytest.raises(UnknownAdapterError):
            registry.resolve(reference)
    again = Registry(registry.folder)
    with pytest.raises(UnknownAdapterError):
        again.resolve("sql")
    again.put_in_service("sql", True)
    assert registry.resolve("prod") == second  # another process's change is noticed
    assert registry.entries()["sql"].pinned
    with pytest.raises(UsageError, match="alias"):
        registry.publish("prod", made[0])
    with pytest.raises(UsageError, match="own name"):
        registry.alias("sql", "sql")
    registry.drop_alias("prod")
    with pytest.raises(UnknownAdapterError):
        registry.resolve("prod")


BAD_NAMES = ["", ".", "..", "../x", "/etc", "a/b", "a\\b", ".hidden", "a\nb", "a\r\nX-Evil: 1", "a\x00b", "ä", "x" * 65,
             "a b", "-a", "a%2fb", "\u2024\u2024", None, 3]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_are_names(registry, made, name):
    for call in (
        lambda: registry.publish(name, made[0]),
        lambda: registry.publish_loose("fine", name),
        lambda: registry.alias(name, "sql"),
    ):
        with pytest.raises(UsageError, match="expected 1 to 64"):
            call()
    if isinstance(name, str):
        with pytest.raises(UnknownAdapterError) as caught:
            registry.resolve(name)
        assert str(caught.value).isprintable()
    with pytest.raises(UnknownAdapterError):
        registry.roll_back(name)
    assert registry.entries() == {}


def test_loose_folders_are_taken_in_once(tmp_path, made):
    shutil.copytree(made[0], tmp_path / "sql")
    shutil.copytree(made[1], tmp_path / "run" / "adapter")
    shutil.copytree(made[2], tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    registry = Registry(tmp_path)
    assert {name: entry.current for name, entry in registry.entries().items()} == {
        "sql": hash_of(made[0])[7:],
        "run": hash_of(made[1])[7:],
    }
    assert list(registry.refused) == ["broken"]
    shutil.rmtree(tmp_path / "sql")
    shutil.copytree(made[2], tmp_path / "sql")
    registry = Registry(tmp_path)
    assert registry.resolve("sql").hash == hash_of(made[2])
    registry.roll_back("sql")
    os.utime(tmp_path / "sql" / "adapter_model.safetensors")  # looks changed, and is what the name has had already
    assert Registry(tmp_path).resolve("sql").hash == hash_of(made[0])


def test_links_lead_nowhere(tmp_path, made):
    folder = tmp_path / "adapters"
    registry = Registry(folder)
    (folder / "out").symlink_to(made[0])
    (folder / "files").mkdir()
    for file in made[0].iterdir():
        (folder / "files" / file.name).symlink_to(file)
    (folder / "pipe").mkdir()
    shutil.copy(made[0] / "adapter_config.json", folder / "pipe")
    os.mkfifo(folder / "pipe" / "adapter_model.safetensors")
    for name in ("out", "files", "pipe"):
        with pytest.raises(FileError, match=r"cannot be (opened|taken in)"):
            registry.publish_loose("x", name)
    assert registry.entries() == {}
    again = Registry(folder)
    assert again.entries() == {}
    assert set(again.refused) == {"out", "files", "pipe"}
    version = registry.publish("x", folder / "files")  # the operator's own call follows a hub cache's links
    shutil.rmtree(version.folder)
    version.folder.symlink_to(made[1])
    with pytest.raises(FileError, match="leads out"):
        registry.resolve("x")


def test_the_registrys_own_files_are_no_links(tmp_path, made):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".versions").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="leads out"):
        Registry(tmp_path / "a")
    Registry(tmp_path / "b").publish("sql", made[0])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "registry.json").symlink_to(tmp_path / "b" / "registry.json")
    with pytest.raises(FileError, match="leads out"):
        Registry(tmp_path / "c")


def test_a_folder_whose_name_is_none_is_told_of(tmp_path, made):
    shutil.copytree(made[0], tmp_path / "my adapter")
    shutil.copytree(made[0], tmp_path / "evil\nname")
    registry = Registry(tmp_path)
    assert registry.entries() == {}
    assert set(registry.refused) == {"my adapter", "evil\nname"}
    assert all(reason.isprintable() for reason in registry.refused.values())


def _tensors(folder: Path, header: bytes, data: bytes = b"", claim: int | None = None) -> None:
    length = struct.pack("<Q", len(header) if claim is None else claim)
    (folder / "adapter_model.safetensors").write_bytes(length + header + data)


def test_sizes_are_bounded_before_anything_is_allocated(tmp_path, made):
    registry = Registry(tmp_path / "adapters", bounds=AdapterBounds(1 << 20, 1 << 12, 1 << 14, 64))
    bad = tmp_path / "bad"

    def refused(message: str) -> None:
        with pytest.raises(FileError, match=message):
            registry.publish("sql", bad)
        assert not list((registry.folder / ".versions").iterdir())

    shutil.copytree(made[0], bad)
    huge = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    _tensors(bad, json.dumps({key: huge}).encode())
    refused("truncated")
    _tensors(bad, json.dumps({key.replace("_B", "_A"): huge}).encode())
    refused("has rank")
    _tensors(bad, b"[" * 4000)
    refused("no JSON")
    _tensors(bad, b" " * 5000)
    refused("header has 5,000 bytes")
    _tensors(bad, b"{}", claim=1 << 60)
    refused("truncated")
    (bad / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle" * 20)
    refused("pickle")
    with open(bad / "adapter_model.safetensors", "wb") as file:
        file.truncate(2 << 20)  # a hole: no disk, and would be read as two megabytes
    refused("at most 1,048,576 are taken")
    shutil.copytree(made[0], bad, dirs_exist_ok=True)
    (bad / "adapter_config.json").write_text(" " * (1 << 15))
    refused("adapter_config.json")
    shutil.copytree(made[0], bad, dirs_exist_ok=True)
    (bad / "adapter_model.safetensors").unlink()
    (bad / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused("not there")


def test_what_does_not_fit_is_not_admitted(tmp_path, made):
    def check(release):
        assert hash_of(release.folder) == release.hash == hash_of(made[0])
        raise FileError("wrong base")

    registry = Registry(tmp_path)
    with pytest.raises(FileError, match="wrong base"):
        registry.publish("sql", made[0], check)
    assert registry.entries() == {}
    assert not list((tmp_path / ".versions").iterdir())
    registry.publish("other", made[0])
    with pytest.raises(FileError, match="wrong base"):
        registry.publish("sql", made[0], check)
    assert registry.resolve("other").folder.is_dir()  # another name's version of the same content stays


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1, "names": [], "aliases": {}}',
        '{"format": 1, "names": {"../x": {}}, "aliases": {}}',
        '{"format": 1, "names": {"x": {"versions": ["../../etc"], "current": "../../etc", "loaded": true, "pinned": false,'
        ' "history": [], "source": null}}, "aliases": {}}',
        '{"format": 1, "names": {}, "aliases": {"a": "b"}}',
        "[" * 100_000,
    ],
)
def test_a_changed_registry_is_not_believed(tmp_path, content):
    (tmp_path / "registry.json").write_text(content)
    with pytest.raises(FileError, match=r"registry\.json"):
        Registry(tmp_path)
    assert (tmp_path / "registry.json").read_text() == content


def test_a_folder_that_cannot_be_written(tmp_path, made):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Registry(tmp_path / "file")


def test_threads_publish_side_by_side(registry, made):
    def work(number: int) -> None:
        for turn in range(4):
            registry.publish(f"n{number}", made[(number + turn) % 3])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Registry(registry.folder).entries() == registry.entries()
    assert {len(entry.history) for entry in registry.entries().values()} == {4}


PUBLISHER = """
import sys
from lorakit.serve.registry import Registry
from lorakit.serve.registry_state import KEPT_EVENTS, Entry
registry = Registry(sys.argv[1])
print("open", flush=True)
turn = 0
while True:
    turn += 1
    registry.publish("moving", sys.argv[2 + turn % 2])
    registry.alias("prod", "kept" if turn % 2 else "moving")
    print(turn, flush=True)
"""


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.long)])
def test_killed_while_publishing(tmp_path, made, rounds):
    folder, draw = tmp_path / "adapters", random.Random(rounds)
    registry = Registry(folder)
    kept = registry.publish("kept", made[2])
    registry.alias("steady", "kept")
    hashes = {hash_of(one) for one in made[:2]}
    for round_ in range(rounds):
        before = set(registry.entries())
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(folder), str(made[0]), str(made[1])],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(draw.random() * 0.08)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        registry = Registry(folder)
        assert before <= set(registry.entries()) <= {"kept", "moving"}, round_
        assert registry.resolve("kept") == registry.resolve("steady") == kept
        assert registry.aliases().get("prod", "kept") in ("kept", "moving")
        if "moving" in registry.entries():
            version = registry.resolve("moving")
            assert version.hash in hashes
            assert hash_of(version.folder) == version.hash
        assert all(one.name[0] != "." for one in (folder / ".versions").iterdir())
        assert not list(folder.glob("*.tmp"))
        registry.publish("moving", made[0])  # the lock of the dead process holds nobody up
    assert not registry.refused


def test_cut_off_before_the_list_is_replaced(registry, made, monkeypatch):
    registry.publish("sql", made[0])
    before = registry.entries()

    def full(path, value):
        raise OutputError("no space left")

    monkeypatch.setattr("lorakit.serve.registry.write_json", full)
    with pytest.raises(LorakitError, match="no space"):
        registry.publish("sql", made[1])
    monkeypatch.undo()
    assert registry.entries() == before == Registry(registry.folder).entries()
    assert registry.publish("sql", made[1]).hash == hash_of(made[1])


def test_a_damaged_version_is_replaced_by_a_whole_one(registry, made):
    version = registry.publish("sql", made[0])
    (version.folder / "adapter_model.safetensors").write_bytes(b"nothing")
    registry.publish("sql", made[0])
    assert (version.folder / "adapter_model.safetensors").stat().st_size > 100
