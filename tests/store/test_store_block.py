"""Tensors of an adapter in one piece of memory, or each in its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from adapting import grow
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.attach.host import host_of
from lorakit.store.block import apart, together

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool]


def some(shape: list[int], kind: int, turned: bool, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(TYPES[kind])
    return values.transpose(0, -1) if turned and shape else values


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 7), max_size=4), st.integers(0, len(TYPES) - 1), st.booleans()), max_size=9
    )
)
def test_copies_are_equal_contiguous_and_apart(drawn: list[tuple[list[int], int, bool]]) -> None:
    sources = [some(shape, kind, turned, seed) for seed, (shape, kind, turned) in enumerate(drawn)]
    for copy in (together, apart):
        copies = copy(sources)
        for source, one in zip(sources, copies, strict=True):
            assert one.is_contiguous()
            assert (one.dtype, one.shape) == (source.dtype, source.shape)
            assert torch.equal(one.float(), source.float())
            assert one.data_ptr() % 64 == 0 or not one.numel()
        for one in copies:
            one.view(torch.uint8 if one.numel() else one.dtype).zero_() if one.dim() else one.zero_()
        for seed, (source, (shape, kind, turned)) in enumerate(zip(sources, drawn, strict=True)):
            assert torch.equal(source.float(), some(shape, kind, turned, seed).float())


def test_one_that_is_changed_leaves_its_neighbours() -> None:
    sources = [torch.full((3,), float(k)) for k in range(4)]
    for copy in (together, apart):
        copies = copy(sources)
        copies[1].fill_(9)
        assert [float(one[0]) for one in copies] == [0, 9, 2, 3]


def test_a_change_in_place_spoils_no_neighbour_s_backward() -> None:
    for copy in (together, apart):
        first, second = copy([torch.ones(3), torch.ones(3)])
        x = torch.ones(3, requires_grad=True)
        y = (x * first).sum()
        second.add_(1)
        y.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(x.grad, first)  # type: ignore[arg-type]


def test_gradients_are_left_behind() -> None:
    source = torch.ones(2, 3, requires_grad=True)
    assert not any(one.requires_grad for copy in (together, apart) for one in copy([source, source.t()]))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [1, 5]},
    ],
)
def test_nothing_of_the_file_s_own_memory_is_kept(tmp_path: Path, fields: dict[str, object], trainable: bool) -> None:
    """Frozen, an adapter takes one piece of memory a type; trained, its tensors have each their own (flat optimizers)."""
    model = tiny.llama()
    lk.attach(model, lk.LoRA(**({"r": 4, "alpha": 8} | fields)), name="a")
    grow(model, "a", 0, 0.3)
    folder = lk.save(model, tmp_path / "a", name="a")
    lk.detach(model, "a")
    lk.load(model, folder, name="a", trainable=trainable)
    tensors = host_of(model).records["a"].tensors()
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    taken = sum(one.nbytes for one in tensors)
    assert len(held) == (len(tensors) if trainable else 1)
    assert taken <= sum(held.values()) <= taken + 64 * len(tensors)
