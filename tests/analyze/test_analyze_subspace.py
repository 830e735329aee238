"""Similarity of subspaces: closed forms, scipy's principal angles, and the paper's identity."""

import numpy as np
import pytest
import tiny
import torch
from analyze_kit import adapter, orthonormal
from scipy.linalg import subspace_angles

import lorakit as lk
from lorakit.analyze.api import analyze
from lorakit.analyze.compress import compress
from lorakit.analyze.subspace import distance, random_similarity, similarity
from lorakit.errors import UsageError


def test_phi_with_itself_is_one_and_with_the_rest_zero():
    whole = orthonormal(20, 20, 0)
    one, rest = whole[:, :6], whole[:, 6:]
    grid = similarity(one, one)
    assert torch.allclose(grid, torch.ones_like(grid), atol=1e-12)
    assert torch.allclose(similarity(one, rest), torch.zeros(6, 14, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("i", "j"), [(5, 5), (3, 8), (8, 3), (1, 1)])
def test_phi_is_one_minus_d_squared_over_p(i, j):
    first, second = orthonormal(30, i, 1), orthonormal(30, j, 2)
    angles = subspace_angles(first.numpy(), second.numpy())
    p = min(i, j)
    d = float(np.sqrt(np.square(np.sin(angles)).sum()))
    assert float(similarity(first, second)[-1, -1]) == pytest.approx(1 - d**2 / p, abs=1e-6)
    assert distance(first, second) == pytest.approx(d, abs=1e-6)
    if i == j:  # Grassmann's projection metric
        apart = torch.linalg.matrix_norm(first @ first.t() - second @ second.t()) / 2**0.5
        assert distance(first, second) == pytest.approx(float(apart), abs=1e-9)


def test_each_cell_is_phi_of_its_own_subspaces():
    first, second = orthonormal(24, 4, 3), orthonormal(24, 7, 4)
    grid = similarity(first, second)
    for i in range(1, 5):
        for j in range(1, 8):
            expected = (first[:, :i].t() @ second[:, :j]).square().sum() / min(i, j)
            assert float(grid[i - 1, j - 1]) == pytest.approx(float(expected))


def test_random_matrices_are_near_their_expectation():
    n, i, j = 400, 20, 60
    draws = [float(similarity(orthonormal(n, i, s), orthonormal(n, j, 1000 + s))[-1, -1]) for s in range(30)]
    assert np.mean(draws) == pytest.approx(j / n, rel=0.05)
    assert float(random_similarity(n, i, j)[-1, -1]) == pytest.approx(j / n, rel=0.15)


def test_an_adapter_with_itself_shares_all_and_with_another_seed_little(tmp_path):
    one, two = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=9)
    same, other = analyze(one, one), analyze(one, two)
    assert all(match.whole == pytest.approx(1) == match.first for match in same.matches)
    assert len(other.matches) == 4
    assert all(match.whole < 0.5 for match in other.matches)
    assert all(0 < match.random < 0.5 for match in other.matches)


def test_a_lower_rank_lies_in_the_higher_one_that_it_was_cut_from(tmp_path):
    whole = adapter(tmp_path / "a", decay=0.5)
    compress(whole, tmp_path / "b", rank=2)
    found = analyze(tmp_path / "b", whole)
    assert {(match.rank, match.other_rank) for match in found.matches} == {(2, 4)}
    assert all(match.whole == pytest.approx(1, abs=1e-6) for match in found.matches)
    mean = found.grids_of("mean")
    assert {grid.kind for grid in mean} == {"q_proj", "v_proj"}
    assert mean[0].phi.shape == mean[0].control.shape == (2, 4)
    assert len(found.grids_of("adapters")) == 4


def test_layers_with_one_subspace_are_found(tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=3, target_modules=["q_proj", "k_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        first, second = (model.model.layers[layer].self_attn.q_proj for layer in (0, 1))
        second.lora_A.copy_(torch.randn(3, 3) @ first.lora_A)  # other combinations of the same inputs
    grids = {grid.kind: grid for grid in analyze(lk.save(model, tmp_path / "a")).grids_of("layers")}
    assert float(grids["q_proj"].phi[0, 1]) == pytest.approx(1, abs=1e-5)
    assert float(grids["k_proj"].phi[0, 1]) < 0.6
    assert grids["q_proj"].layers == (0, 1)
    assert float(grids["q_proj"].control[0, 1]) < 0.6


def test_adapters_that_cannot_be_compared_are_refused(tmp_path):
    one = adapter(tmp_path / "a")
    with pytest.raises(UsageError, match="share no module"):
        analyze(one, adapter(tmp_path / "b", target_modules=["k_proj"]))
    with pytest.raises(UsageError, match="other widths"):
        analyze(one, adapter(tmp_path / "c", tiny.llama(hidden_size=64)))
    partly = analyze(one, adapter(tmp_path / "d", target_modules=["v_proj", "k_proj"]))
    assert len(partly.matches) == 2
    assert sum("not compared" in note for note in partly.notes) == 2
