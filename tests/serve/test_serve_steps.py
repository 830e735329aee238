"""Steps of a served model, one after the other: whatever changed in between, each row has its own adapter's output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_kit import BASES, saved
from torch import Tensor

import lorakit as lk
from lorakit.core.batched import Stack
from lorakit.errors import AdapterError
from lorakit.serve.bank import Bank, Version

METHODS: tuple[dict[str, Any], ...] = (
    {"r": 4},
    {"r": 4},
    {"r": 4, "use_dora": True},
    {"r": 4},
    {"r": 6, "lora_bias": True},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    tmp = tmp_path_factory.mktemp("steps")
    return [saved("llama", tmp / str(k), seed=k, **fields) for k, fields in enumerate(METHODS)]


@pytest.fixture(scope="module")
def alone(folders: list[Path]) -> Any:
    model = BASES["llama"]()
    for k, folder in enumerate(folders):
        lk.load(model, folder, name=str(k))
    return model


@pytest.fixture
def bank(folders: list[Path]) -> Iterator[Bank]:
    with Bank(BASES["llama"](), device_ranks=64) as bank:
        yield bank


def held(bank: Bank, folders: list[Path]) -> list[Version]:
    versions = [bank.load(folder, str(k)) for k, folder in enumerate(folders)]
    for version in versions:
        bank.hold(version)
    return versions


def expected(alone: Any, ids: Tensor, owners: list[int]) -> Tensor:
    rows = []
    for row, owner in zip(ids, owners, strict=True):
        with lk.use(alone, str(owner) if owner >= 0 else None), torch.no_grad():
            rows.append(alone(row[None]).logits)
    return torch.cat(rows)


def check(
    bank: Bank, alone: Any, versions: list[Version], ids: Tensor, owners: list[int], *, strict: bool = False
) -> None:
    bank.live.spread(tuple(versions[owner].id if owner >= 0 else -1 for owner in owners), strict=strict)
    with torch.no_grad():
        actual = bank.model(ids).logits
    torch.testing.assert_close(actual, expected(alone, ids, owners), rtol=1e-4, atol=1e-5)


def test_every_step_is_its_own(bank: Bank, folders: list[Path], alone: Any) -> None:
    versions = held(bank, folders)
    for version in versions[:4]:
        assert bank.place(version, {one.id for one in versions})
    one, long = torch.randint(3, 250, (4, 1)), torch.randint(3, 250, (4, 5))
    for _ in range(2):  # the second time on what the first has kept
        check(bank, alone, versions, one, [0, 1, 2, 3])
        check(bank, alone, versions, one, [0, 1, 2, 3])
        check(bank, alone, versions, one, [3, 2, 1, 0])
        check(bank, alone, versions, one, [0, 0, 0, 0])
        check(bank, alone, versions, one, [0, 1, -1, 3])
        check(bank, alone, versions, one, [-1, -1, -1, -1])
        check(bank, alone, versions, one, [0, 1, 2, 3], strict=True)
        check(bank, alone, versions, long, [0, 1, 2, 3])
        check(bank, alone, versions, long, [1, 1, 1, 1])
    bank.places.drop(versions[1].id)  # another takes its rows; the step of the others is the same as before
    assert bank.place(versions[4], {versions[0].id, versions[2].id, versions[3].id})
    check(bank, alone, versions, one, [0, 4, 2, 3])
    check(bank, alone, versions, one, [0, 0, 0, 0])


def test_the_input_may_be_given_by_its_name_and_under_autocast(bank: Bank, folders: list[Path], alone: Any) -> None:
    versions = held(bank, folders)
    assert bank.place(versions[0], set())
    bank.live.spread((versions[0].id,))
    leaf, x = bank.model.model.layers[0].self_attn.q_proj, torch.randn(1, 1, bank.model.config.hidden_size)
    with torch.no_grad():
        first, second = leaf(x), leaf(x)
        assert torch.equal(first, second)
        assert torch.equal(leaf(input=x), first)
        turned = torch.randn(x.shape[-1], 1, 1).permute(1, 2, 0)
        assert torch.equal(leaf(turned), leaf(turned.clone()))
        torch.testing.assert_close(leaf(x.double().float()), first)
        with torch.autocast("cpu", torch.bfloat16):
            half = leaf(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), first, rtol=3e-2, atol=3e-2)
    with pytest.raises(AdapterError, match="being served"):
        leaf(x)
    bank.live.plain()
    with pytest.raises(AdapterError, match="being served"):
        leaf(x)


def test_adapters_that_run_move_together(bank: Bank, folders: list[Path], alone: Any) -> None:
    versions = held(bank, folders)
    every = {one.id for one in versions}
    for version in versions:
        assert bank.place(version, every)
    ids = torch.randint(3, 250, (3, 1))
    check(bank, alone, versions, ids, [0, 3, 4])
    bank.places.running["test"] = frozenset({-1, versions[0].id, versions[3].id, versions[4].id})
    bank.settle()
    starts = {
        version.name: bank.places.placed[version.id].start for version in versions if version.id in bank.places.placed
    }
    assert starts == {"0": 0, "3": 12, "4": 4}  # 6 rows where the 8 of two that do not run were
    for stack in bank.live.stacks.values():
        assert isinstance(stack, Stack)
        assert all(stack.spans[versions[int(name)].id].start == start for name, start in starts.items())
    check(bank, alone, versions, ids, [0, 3, 4])
    before = bank.places.moves
    bank.settle()
    assert bank.places.moves == before
    bank.places.running["test"] = frozenset({versions[3].id})
    bank.settle()
    assert bank.places.placed[versions[3].id].start == 0
    check(bank, alone, versions, ids[:1], [3])
