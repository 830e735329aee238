"""Singular values from the factors, and the ranks made of them, against dense SVDs and closed forms."""

import copy
import math

import pytest
import tiny
import torch
from analyze_kit import adapter, dense

import lorakit as lk
from lorakit.analyze.api import analyze
from lorakit.analyze.spectrum import directions, effective_rank, energy, numerical_rank, rank_for, stable_rank
from lorakit.analyze.updates import Update, kind_labels, read_adapter
from lorakit.errors import FileError, UsageError


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": -3}}]
)
def test_values_are_those_of_the_dense_update(tmp_path, fields):
    folder = adapter(tmp_path / "a", **fields)
    found = {one.path: one for one in analyze(folder).modules}
    for path, delta in dense(folder).items():
        one = found[path]
        expected = torch.linalg.svdvals(delta)[: one.rank]
        torch.testing.assert_close(torch.tensor(one.values, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
        assert one.norm == pytest.approx(float(delta.norm()))
        assert one.stable_rank == pytest.approx(float(delta.norm() ** 2 / torch.linalg.matrix_norm(delta, 2) ** 2))
        assert one.shape == tuple(delta.shape)


def test_directions_rebuild_the_update(tmp_path):
    folder = adapter(tmp_path / "a")
    deltas = dense(folder)
    for update in read_adapter(folder).updates:
        found = directions(update)
        torch.testing.assert_close(found.left * found.values @ found.right.t(), deltas[update.path])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_update_of_rank_k_made_by_hand_has_rank_k(k):
    torch.manual_seed(k)
    a, b = torch.randn(k, 40), torch.randn(50, k)
    mix = torch.randn(8, k)  # eight directions that are combinations of k, rounded to float32
    update = Update("x", "x", None, mix @ a, b @ torch.linalg.pinv(mix), 2.0)
    assert directions(update).values.numel() == k
    expected = torch.linalg.svdvals(2.0 * b.double() @ a.double())[:k]
    torch.testing.assert_close(directions(update).values, expected, rtol=1e-4, atol=0)


def test_ranks_of_known_spectra():
    equal, single = torch.ones(6, dtype=torch.float64), torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert effective_rank(equal) == pytest.approx(6)
    assert stable_rank(equal) == pytest.approx(6)
    assert effective_rank(single) == stable_rank(single) == pytest.approx(1)
    two = torch.tensor([3.0, 1.0])  # p = 3/4, 1/4
    assert effective_rank(two) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert energy(two).tolist() == pytest.approx([0.9, 1.0])
    assert [rank_for(two, share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert numerical_rank(torch.tensor([1.0, 1e-3, 1e-9])) == 2


def test_a_fresh_adapter_is_zero_and_said_so(tmp_path):
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=2, target_modules=["q_proj"]))
    found = analyze(lk.save(model, tmp_path / "a"))
    assert all(one.norm == 0 == one.numerical_rank == one.effective_rank for one in found.modules)
    assert any("2 updates are zero" in note for note in found.notes)
    assert found.save(tmp_path / "out").joinpath("report.html").is_file()


def test_embeddings_and_groups(tmp_path):
    folder = adapter(tmp_path / "e", tiny.gpt2(), target_modules=["wte", "c_attn"])
    kinds = analyze(folder).kinds()
    assert kinds["wte"][0].shape == (32, tiny.VOCAB)
    assert len(kinds["c_attn"]) == 2
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    folder = adapter(tmp_path / "c", model, target_modules=["0"])
    one, two = analyze(folder).modules
    assert (one.path, two.path) == ("0[0]", "0[1]")
    delta = model[0].weight.detach().clone()
    lk.merge(model, "default")
    delta = (model[0].weight.detach() - delta).double()
    for block, part in ((one, delta[:3]), (two, delta[3:])):
        assert block.norm == pytest.approx(float(part.norm()), rel=1e-5)


class Stack(torch.nn.Module):
    """Three experts' weights in one parameter, (E, in, out), and an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.down = torch.nn.Parameter(torch.randn(3, 10, 6))
        self.mha = torch.nn.MultiheadAttention(8, 2)


def test_experts_are_told_one_by_one_and_attention_by_projection(tmp_path):
    model = Stack()
    base = copy.deepcopy(model)
    folder = adapter(tmp_path / "a", model, r=2, target_modules=["mha"], target_parameters=["experts.down"])
    lk.merge(model, "default")
    found = analyze(folder, base=base)
    norms = {one.path: one.norm for one in found.modules}
    for expert in range(3):
        delta = (model.experts.down - base.experts.down)[expert]
        assert norms[f"experts[{expert}]"] == pytest.approx(float(delta.detach().norm()), rel=1e-5)
    delta = (model.mha.in_proj_weight - base.mha.in_proj_weight).detach()
    one = next(one for one in found.modules if one.path == "mha")
    assert one.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert one.against_base.weight == pytest.approx(float(base.mha.in_proj_weight.detach().norm()), rel=1e-6)
    assert any(
        "not held against it: experts[0], experts[1], experts[2]" in note.replace("are ", "") for note in found.notes
    )


def test_labels_are_short_and_tell_types_apart():
    paths = [
        f"roberta.encoder.layer.{n}.{end}"
        for n in (0, 11)
        for end in ("attention.output.dense", "output.dense", "query")
    ]
    labels = kind_labels(paths)
    assert labels["roberta.encoder.layer.11.query"] == "query"
    assert labels["roberta.encoder.layer.0.query"] == "query"
    assert len(set(labels.values())) == 3


def test_layers_come_in_their_order(tmp_path):
    folder = adapter(tmp_path / "a", tiny.llama(num_hidden_layers=11), target_modules=["q_proj"])
    assert [one.layer for one in analyze(folder).modules] == list(range(11))


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileError, match="not there"):
        analyze(tmp_path / "nothing")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(FileError, match="lorakit convert"):
        analyze(tmp_path / "x.safetensors")
    model = tiny.llama()
    lk.attach(model, lk.LoRA(target_modules=[], trainable_token_indices=[1]))
    with pytest.raises(UsageError, match="no low-rank pairs"):
        analyze(lk.save(model, tmp_path / "tokens"))
