"""Against the base: Table 7 and Figure 8 by brute force; nothing of the model or the files is changed."""

import pytest
import tiny
import torch
from analyze_kit import adapter, dense, digest

import lorakit as lk
from lorakit.analyze.against import top_directions
from lorakit.analyze.api import analyze
from lorakit.analyze.subspace import similarity
from lorakit.errors import AdapterError, FileError, ModelError


def test_table_7_by_brute_force(tmp_path):
    folder, model = adapter(tmp_path / "a"), tiny.llama()
    found = {one.path: one for one in analyze(folder, base=model).modules}
    for path, delta in dense(folder).items():
        weight = model.get_submodule(path).weight.detach().double()
        u, s, vh = (
            part[:, :4] if part.dim() == 2 else part[:4] for part in torch.linalg.svd(delta, full_matrices=False)
        )
        vh = torch.linalg.svd(delta, full_matrices=False).Vh[:4]
        one = found[path].against_base
        assert one.weight == pytest.approx(float(weight.norm()))
        assert one.moved == pytest.approx(float(delta.norm() / weight.norm()))
        projected = float((u.t() @ weight @ vh.t()).norm())
        assert one.projected == pytest.approx(projected)
        assert one.factor == pytest.approx(float(s.norm()) / projected)
        assert one.own == pytest.approx(float(torch.linalg.svdvals(weight)[:4].norm()))
        assert 0 < one.random < one.own


def test_amplification_of_updates_made_by_hand(tmp_path):
    """dW = 3 x the top direction of W amplifies by 3 / its value's share; one W has nothing of has no factor to tell."""
    model = tiny.llama()
    lk.attach(model, lk.LoRA(r=1, alpha=1, target_modules=["q_proj"]))
    for layer, at in ((0, 0), (1, -1)):
        leaf = model.model.layers[layer].self_attn.q_proj
        u, s, vh = torch.linalg.svd(leaf.weight.detach())
        with torch.no_grad():
            leaf.lora_A.copy_(vh[at : at + 1 or None])
            leaf.lora_Bt.copy_(3 * s[at] * u[:, at][None])
    first, last = analyze(lk.save(model, tmp_path / "a"), base=tiny.llama()).modules
    assert first.against_base.factor == pytest.approx(3, rel=1e-4)
    assert last.against_base.factor == pytest.approx(3, rel=1e-3)
    assert first.against_base.projected == pytest.approx(first.against_base.own, rel=1e-5)
    assert last.against_base.projected < 0.1 * last.against_base.own


def test_figure_8_is_phi_of_the_update_and_its_weight(tmp_path):
    folder, model = adapter(tmp_path / "a"), tiny.llama()
    grid = next(grid for grid in analyze(folder, base=model).grids_of("weight") if grid.kind == "q_proj")
    path = f"model.layers.{grid.layer}.self_attn.q_proj"
    delta = torch.linalg.svd(dense(folder)[path]).Vh[:4].t()
    own = torch.linalg.svd(model.get_submodule(path).weight.detach().double()).Vh.t()
    torch.testing.assert_close(grid.phi, similarity(delta, own[:, : grid.phi.shape[1]]), rtol=1e-5, atol=1e-6)
    assert grid.control.shape == grid.phi.shape == (4, 32)


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_nothing_is_changed(tmp_path, family):
    model = tiny.MODELS[family]()
    targets = ["c_attn", "wte"] if family == "gpt2" else ["query", "output.dense"]
    folder = adapter(tmp_path / "a", tiny.MODELS[family](), target_modules=targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files, state, modes = digest(folder), torch.random.get_rng_state(), [one.training for one in model.modules()]
    found = analyze(folder, folder, base=model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert digest(folder) == files
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [one.training for one in model.modules()] == modes
    assert all(one.against_base for one in found.modules)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1100, 1200), (1200, 1100)])
def test_top_directions_of_a_weight(shape):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 60 if min(shape) > 60 else 40)).Q for side in shape)
    weight = left * 0.9 ** torch.arange(left.shape[1]) @ right.t()
    found = top_directions(weight, 5)
    expected = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(found.values, expected.S[:5], rtol=1e-3, atol=0)
    assert float(similarity(found.right, expected.Vh[:5].t())[-1, -1]) == pytest.approx(1, abs=1e-3)
    assert float(similarity(found.left, expected.U[:, :5])[-1, -1]) == pytest.approx(1, abs=1e-3)


def test_another_base_is_refused(tmp_path):
    folder = adapter(tmp_path / "a")
    with pytest.raises(FileError, match="does not fit"):
        analyze(folder, base=tiny.gpt2())
    with pytest.raises(ModelError):
        analyze(folder, base=str(tmp_path / "no-model"))
    merged = tiny.llama()
    lk.load(merged, folder)
    lk.merge(merged, "default")
    with pytest.raises(AdapterError, match="merged"):
        analyze(folder, base=merged)


def test_a_classifier_is_loaded_with_its_own_head(tmp_path):
    import json

    import runs

    name = runs.save_model(tmp_path / "model", tiny.roberta)
    model = tiny.roberta(vocab_size=99, pad_token_id=0)
    model.load_state_dict(type(model).from_pretrained(name).state_dict())
    folder = adapter(tmp_path / "a", model, target_modules=["query"], modules_to_save=["classifier"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    found = analyze(folder, base=name)
    assert all(one.against_base for one in found.modules)
    assert any("trained in full" in note for note in found.notes)
