"""The bank: admission, versions, tiers, leases, and the plain model that comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from adapting import assert_same, snapshot
from serve_kit import BASES, saved

import lorakit as lk
from lorakit.errors import AdapterError, FileError, ServeError, UnknownAdapterError, UsageError
from lorakit.serve.bank import Bank, Resident


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "a")


def of(bank: Bank) -> dict[str, Resident]:
    return {one.version.name: one for one in bank.resident()}


def test_a_closed_bank_leaves_the_base_bit_for_bit(folder: Path) -> None:
    model = BASES["llama"]()
    before = snapshot(model)
    with Bank(model) as bank:
        version = bank.load(folder, "a")
        with bank.lease(version):
            assert bank.place(version, set())
        assert model.model.layers[0].self_attn.q_proj.weight.requires_grad is False
    assert_same(before, snapshot(model))


def test_an_adapter_takes_the_memory_of_its_file(folder: Path) -> None:
    with Bank(BASES["llama"]()) as bank:
        version = bank.load(folder, "a")
        assert version.bytes <= 1.1 * (folder / "adapter_model.safetensors").stat().st_size
        assert bank.counters()["bytes"] == version.bytes
        assert version.hash == json.loads((folder / "lorakit.json").read_text())["adapter"]
        assert version.rank == 4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_rows_hold_no_memory_beside_their_own(tmp_path: Path, fields: dict[str, object]) -> None:
    folder = saved("llama", tmp_path / "a", **fields)
    with Bank(BASES["llama"]()) as bank:
        version = bank.load(folder, "a")
        with bank.lease(version):
            tensors = [tensor for row in bank.rows(version).layers.values() for tensor in row.tensors()]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    assert version.bytes <= sum(held.values()) <= version.bytes + 64 * len(tensors)


MANY = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
import lorakit as lk
from lorakit.serve.bank import Bank

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=6,
                                     num_attention_heads=8, max_position_embeddings=64))
lk.attach(model, lk.LoRA(r=16, alpha=16, target_modules="all-linear"), name="a")
folder = lk.save(model, sys.argv[1], name="a")
lk.detach(model, "a")
with Bank(model) as bank:
    for k in range(5):
        bank.load(folder, f"warm {k}")
    before = held()
    for k in range(40):
        bank.load(folder, str(k))
    print((held() - before) / 40 / (folder / "adapter_model.safetensors").stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory as Linux shows it")
def test_the_process_grows_by_what_the_files_have(tmp_path: Path) -> None:
    """Not the bank's own count: allocated one by one, the tensors left holes, and the process took 1.5 times the files."""
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.15


def test_the_longest_unused_goes_and_is_read_again(tmp_path: Path) -> None:
    folders = {name: saved("llama", tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    with Bank(BASES["llama"]()) as bank:
        size = bank.load(folders["a"], "a").bytes
    with Bank(BASES["llama"](), memory=2 * size) as bank:
        a, b = bank.load(folders["a"], "a"), bank.load(folders["b"], "b")
        with bank.lease(a):
            pass
        c = bank.load(folders["c"], "c")
        assert {name: one.tier for name, one in of(bank).items()} == {"a": "memory", "b": "disk", "c": "memory"}
        bank.pin(a)
        with bank.lease(b):
            assert {name: one.tier for name, one in of(bank).items()} == {"a": "memory", "b": "memory", "c": "disk"}
            with pytest.raises(ServeError, match="pinned or in use"):
                bank.acquire(c, patience=0.0)
        assert bank.counters()["disk_reads"] == 1
        assert bank.counters()["memory_evictions"] == 2
        bank.unpin(a)
        with bank.lease(c):
            assert of(bank)["a"].tier == "disk"
        assert all(one.users == 0 for one in bank.resident())


def test_one_that_waits_for_room_gets_it_when_a_request_ends(tmp_path: Path) -> None:
    folders = {name: saved("llama", tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    with Bank(BASES["llama"]()) as bank:
        size = bank.load(folders["a"], "a").bytes
    with Bank(BASES["llama"](), memory=size) as bank:
        a = bank.load(folders["a"], "a")
        b = bank.load(folders["b"], "b")
        bank.acquire(b)
        waiting = threading.Thread(target=bank.acquire, args=(a,))
        waiting.start()
        bank.release(b)
        waiting.join(30)
        assert not waiting.is_alive()
        assert of(bank)["a"].tier == "memory"
        bank.release(a)


def test_unloaded_while_in_use_it_stays_for_those_who_hold_it(folder: Path) -> None:
    with Bank(BASES["llama"]()) as bank:
        first, second = bank.load(folder, "a"), bank.load(folder, "a")
        assert first.id != second.id
        with bank.lease(first):
            bank.unload(first)
            assert bank.place(first, set())
            with pytest.raises(UnknownAdapterError, match="version 1"):
                bank.acquire(first)
        assert [one.version.id for one in bank.resident()] == [second.id]
        assert bank.counters()["bytes"] == second.bytes
        with pytest.raises(UnknownAdapterError):
            bank.unload(first)


def test_a_folder_that_changed_is_not_read_as_the_old_version(tmp_path: Path) -> None:
    folders = {name: saved("llama", tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    with Bank(BASES["llama"]()) as bank:
        size = bank.load(folders["a"], "a").bytes
    with Bank(BASES["llama"](), memory=size) as bank:
        a = bank.load(folders["a"], "a")
        bank.load(folders["b"], "b")
        saved("llama", folders["a"], seed=9)
        with pytest.raises(FileError, match="not the one that was loaded"):
            bank.acquire(a)
        assert of(bank)["a"].users == 0


def test_what_does_not_fit_is_refused_and_nothing_is_admitted(tmp_path: Path, folder: Path) -> None:
    with Bank(BASES["llama"]()) as bank:
        with pytest.raises(FileError, match="not there"):
            bank.load(tmp_path / "none", "a")
        with pytest.raises(FileError, match="no such module"):
            bank.load(saved("gpt2", tmp_path / "g"), "a")
        other = BASES["llama"]()
        torch.manual_seed(5)
        torch.nn.init.normal_(other.model.embed_tokens.weight)
        with pytest.raises(FileError, match="another base"):
            bank.load(saved("llama", tmp_path / "o", base=lambda: other), "a")
        (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-40])
        with pytest.raises(FileError, match="truncated"):
            bank.load(folder, "a")
        assert bank.resident() == []
        assert bank.counters()["bytes"] == 0
    with Bank(BASES["llama"](), memory=100) as small:
        big = saved("llama", tmp_path / "big", r=32, target_modules=["lm_head", "up_proj", "down_proj", "q_proj"])
        with pytest.raises(ServeError, match="100 bytes"):
            small.load(big, "a")
        (big / "adapter_model.safetensors").write_bytes(bytes(2 << 20))
        with pytest.raises(FileError, match="100 are allowed"):
            small.load(big, "a")


def test_what_rows_of_one_batch_cannot_take_is_refused(tmp_path: Path) -> None:
    whole = saved("llama", tmp_path / "w", modules_to_save=["norm"])
    rows = saved("llama", tmp_path / "r", trainable_token_indices=[3, 4])
    with Bank(BASES["llama"](), device_ranks=8) as bank:
        with pytest.raises(UsageError, match="norm: weight trained in full"):
            bank.load(whole, "w")
        with pytest.raises(UsageError, match="rows of tokens"):
            bank.load(rows, "r")
        with pytest.raises(UsageError, match="rank 16, above the 8"):
            bank.load(saved("llama", tmp_path / "large", r=16), "l")


def test_a_model_with_adapters_of_its_own_is_refused() -> None:
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=2))
    with pytest.raises(AdapterError, match="detach them first"):
        Bank(model)


def test_the_banks_model_cannot_be_changed_from_outside(folder: Path) -> None:
    model = BASES["llama"]()
    with Bank(model) as bank:
        bank.load(folder, "a")
        for change in (
            lambda: lk.attach(model, lk.LoRA(r=2)),
            lambda: lk.use(model, None),
            lambda: lk.load(model, folder, name="b"),
        ):
            with pytest.raises(AdapterError, match="serving bank"):
                change()


def test_a_served_model_records_no_gradients_without_a_word(folder: Path) -> None:
    model = BASES["llama"]()
    with Bank(model) as bank:
        bank.load(folder, "a")
        with pytest.raises(AdapterError, match="being served"):
            model(torch.tensor([[5, 6]]))
    model(torch.tensor([[5, 6]])).logits.sum().backward()


def test_places_go_to_the_longest_unused_and_never_to_the_running(tmp_path: Path) -> None:
    folders = [saved("llama", tmp_path / str(k), seed=k, r=r) for k, r in enumerate((4, 2, 6, 3))]
    with Bank(BASES["llama"](), device_ranks=8) as bank:
        a, b, c, d = (bank.load(folder, str(k)) for k, folder in enumerate(folders))
        for version in (a, b, c, d):
            bank.hold(version)
        assert bank.place(a, set())
        assert bank.place(b, {a.id})
        assert not bank.place(c, {a.id})  # 6 rows, and 4 of 8 run
        assert bank.place(c, {b.id}) is False
        assert bank.place(c, set())
        assert set(bank.places.placed) == {c.id}
        assert bank.place(b, {c.id})
        assert not bank.place(d, {c.id, b.id})
        assert bank.place(d, {c.id}) is False
        assert bank.place(d, {b.id})
        for path, stack in bank.live.stacks.items():
            assert set(stack.spans) == {b.id, d.id}, path
        for version in (a, b, c, d):
            bank.release(version)


def test_layouts_that_were_take_no_memory_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.serve.places.HISTORIES", 8)
    folders = [saved("llama", tmp_path / str(k), seed=k) for k in range(3)]
    with Bank(BASES["llama"](), device_ranks=8) as bank:
        versions = [bank.load(folder, "a") for folder in folders]
        for version in versions:
            bank.hold(version)
        for turn in range(40):
            assert bank.place(versions[turn % 3], set())
            keys = {(stack.key, tuple(stack.spans)) for stack in bank.live.stacks.values()}
            assert len(keys) == 1  # layers of one layout share what a plan computes
        assert len(bank.places._keys) < 20
        for version in versions:
            bank.release(version)
