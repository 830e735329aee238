"""Rows of embeddings trained in full (new tokens), and weights that an embedding shares with the head, against models
whose rows are written out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapting import assert_same, grow, host, logits, snapshot
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterError, FileError, TargetError, UsageError

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
ROWS = [40, 3, 7]
KINDS = {"gpt2": ("transformer.wte", True), "llama": ("model.embed_tokens", False), "t5": ("shared", True)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Ids among which every trained row stands, in every row of the batch but the last."""
    inputs = tiny.batch(model, rows=4)
    for key in ("input_ids", "decoder_input_ids"):
        if key in inputs:
            inputs[key][:3, 1:4] = torch.tensor(ROWS)
    return inputs


def adapted(kind: str, *names: str, **fields: Any) -> nn.Module:
    model = tiny.MODELS[kind]()
    for number, name in enumerate(names or ("a",)):
        lk.attach(model, lk.LoRA(**({"target_modules": [], "trainable_token_indices": ROWS} | fields)), name=name)
        grow(model, name, seed=number + 1, std=0.3)
    return model


def written_out(kind: str, model: nn.Module, weights: dict[str, float]) -> nn.Module:
    """A plain model with the rows in its embedding (and in the head that shares it)."""
    plain = tiny.MODELS[kind]()
    weight = plain.get_submodule(KINDS[kind][0]).weight
    base = weight.detach().clone()
    with torch.no_grad():
        for name, strength in weights.items():
            (rows,) = host(model).records[name].draft.tokens.values()
            assert rows.indices.tolist() == sorted(ROWS)
            weight[rows.indices] += strength * (rows.rows - base[rows.indices])
    return plain


@every_kind
def test_rows_are_as_if_written_into_the_embedding_and_the_head_that_shares_it(kind: str) -> None:
    model = adapted(kind, "a", "b")
    inputs = batch(model)
    for name in ("a", "b"):
        lk.use(model, name)
        torch.testing.assert_close(
            logits(model, inputs), logits(written_out(kind, model, {name: 1.0}), inputs), **CLOSE
        )
    base = logits(tiny.MODELS[kind](), inputs)
    with lk.use(model, None):
        assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize(
    "weights", [{"a": 0.5, "b": 0.7}, {"a": 1.0, "b": 0.5}, {"b": 0.5, "a": 1.0}, {"a": 0.4}], ids=str
)
@every_kind
def test_weighed_rows_add_up_in_any_order_and_merge(kind: str, weights: dict[str, float]) -> None:
    model = adapted(kind, "a", "b")
    inputs = batch(model)
    expected = logits(written_out(kind, model, weights), inputs)
    with lk.use(model, weights):
        torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    lk.merge(model, weights)
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)


@every_kind
def test_gradients_reach_the_rows_alone_and_are_those_of_the_written_out_weight(kind: str) -> None:
    model = adapted(kind)
    inputs = batch(model) | ({"labels": batch(model)["input_ids"]} if kind != "t5" else {})
    plain = written_out(kind, model, {"a": 1.0})
    model(**inputs).logits.square().sum().backward()
    plain(**inputs).logits.square().sum().backward()
    (rows,) = lk.parameters(model, "a")
    weight = plain.get_submodule(KINDS[kind][0]).weight
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, weight.grad[sorted(ROWS)], atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)
    assert lk.count_parameters(model).trainable == rows.numel() == 3 * weight.shape[1]


@every_kind
def test_a_routed_row_is_the_row_alone(kind: str) -> None:
    model = adapted(kind, "a", "b")
    inputs = batch(model)
    rows = ["a", None, "b", "a"]
    with lk.route(model, rows):
        mixed = logits(model, inputs)
    for row, name in enumerate(rows):
        with lk.use(model, name):
            alone = logits(model, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(mixed[row : row + 1], alone, **CLOSE)


@every_kind
def test_merging_keeps_what_was_tied_tied_and_unmerge_restores_every_bit(kind: str) -> None:
    model = adapted(kind)
    path, tied = KINDS[kind]
    inputs, before, base = batch(model), snapshot(model), tiny.MODELS[kind]().state_dict()
    expected = logits(model, inputs)
    lk.merge(model, "a")
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    assert (model.get_output_embeddings().weight is model.get_submodule(path).weight) == tied
    lk.unmerge(model)
    assert torch.equal(logits(model, inputs), expected)
    after = snapshot(model)
    assert all(torch.equal(after["state"][key][1], base[key]) for key in base)
    assert before["parameters"] == after["parameters"]


@every_kind
def test_a_fresh_adapter_changes_no_bit_and_detach_leaves_none(kind: str) -> None:
    model = tiny.MODELS[kind]()
    inputs, before = batch(model), snapshot(model)
    expected = logits(model, inputs)
    lk.attach(model, lk.LoRA(target_modules=[], trainable_token_indices=ROWS))
    with torch.no_grad():
        embedded = model.get_submodule(KINDS[kind][0])(inputs["input_ids"])
        assert torch.equal(embedded, tiny.MODELS[kind]().get_submodule(KINDS[kind][0])(inputs["input_ids"]))
    # a head's rows are computed again, in a product of another shape, which rounds otherwise
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-6)
    lk.detach(model, "default")
    assert_same(before, snapshot(model))


@every_kind
def test_copies_pickles_and_files_go_on_as_the_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    inputs = batch(model)
    expected = logits(model, inputs)
    lk.save(model, tmp_path, "a")
    loaded = tiny.MODELS[kind]()
    lk.load(loaded, tmp_path, "a")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(logits(other, inputs), expected)
        lk.detach(other, "a")
        assert torch.equal(logits(other, inputs), logits(tiny.MODELS[kind](), inputs))


def test_new_tokens_are_added_and_trained_and_come_back_from_the_file(tmp_path: Path) -> None:
    def grown() -> nn.Module:
        model = tiny.gpt2()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(tiny.VOCAB + 2, mean_resizing=False)
        return model

    model, new = grown(), [tiny.VOCAB, tiny.VOCAB + 1]
    lk.attach(model, lk.LoRA(r=2, target_modules=["c_attn"], trainable_token_indices=new))
    inputs = {"input_ids": torch.tensor([[5, *new, 6]])}
    optimizer = torch.optim.AdamW(lk.parameters(model, "default"), lr=0.05)
    losses = []
    for _ in range(10):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    lk.save(model, tmp_path)
    again = grown()
    lk.load(again, tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    with pytest.raises(FileError, match="beyond the model's 96"):
        lk.load(tiny.gpt2(), tmp_path, check_base=False)


WRONG = [
    ({"trainable_token_indices": [3, 96]}, UsageError, "rows 0 to 95"),
    ({"trainable_token_indices": [-1]}, UsageError, "rows 0 to 95"),
    ({"trainable_token_indices": []}, UsageError, "target_modules is empty"),
    ({"trainable_token_indices": {"wte": []}}, UsageError, "none"),
    ({"trainable_token_indices": {"c_attn": [1]}}, TargetError, "expected an embedding"),
    ({"trainable_token_indices": {"nowhere": [1]}}, TargetError, "does not have"),
    ({"trainable_token_indices": [1], "target_modules": ["wte"]}, UsageError, "out of one of the two"),
    ({"trainable_token_indices": [1], "modules_to_save": ["wte"]}, UsageError, "trained in full"),
    ({"target_modules": ["wte"], "ensure_weight_tying": True, "use_dora": True}, UsageError, "of the embedding's"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG)
def test_what_makes_no_sense_is_refused_and_leaves_the_model(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny.gpt2()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lk.attach(model, lk.LoRA(**({"r": 2, "target_modules": []} | fields)))
    assert_same(before, snapshot(model))


def test_rows_asked_for_twice_are_one_row(tmp_path: Path) -> None:
    model = adapted("gpt2", trainable_token_indices=[5, 9, 5])
    assert lk.parameters(model, "a")[0].shape[0] == 2
    lk.save(model, tmp_path, "a")
    again = tiny.gpt2()
    lk.load(again, tmp_path, "a")
    assert torch.equal(logits(again, tiny.batch(again)), logits(model, tiny.batch(model)))


@pytest.mark.parametrize("untied", [True, False])
def test_an_encoder_and_decoder_take_the_rows_of_what_they_share(untied: bool) -> None:
    """PEFT's adapter on T5's `shared` changes nothing there: the embeddings that are called are other modules."""
    model = adapted("t5", **({"trainable_token_indices": {"embed_tokens": ROWS}} if untied else {}))
    paths = ["encoder.embed_tokens", "decoder.embed_tokens"]
    rows = host(model).records["a"].draft.tokens
    assert list(rows) == (paths if untied else ["shared"])
    ids = torch.tensor(sorted(ROWS))
    with torch.no_grad():
        for path in paths:
            expected = rows[path if untied else "shared"].rows
            assert torch.equal(model.get_submodule(path)(ids), expected)
        merged = copy.deepcopy(model)
        lk.merge(merged, "a")
        torch.testing.assert_close(logits(merged, batch(merged)), logits(model, batch(model)), **CLOSE)
        lk.unmerge(merged)
        assert merged.lm_head.weight is merged.encoder.embed_tokens.weight


# -- an embedding that shares its weight with the head -----------------------------------------------------------------


def tied_total(model: nn.Module, name: str) -> Tensor:
    pair = host(model).records[name].draft.pairs["transformer.wte"]
    return tiny.gpt2().transformer.wte.weight.detach() + pair.scale * pair.A.detach() @ pair.Bt.detach()


def two(**fields: Any) -> nn.Module:
    model = tiny.gpt2()
    for number, name in enumerate(("a", "b")):
        lk.attach(model, lk.LoRA(r=2, alpha=3, target_modules=["wte"], **fields), name=name)
        grow(model, name, seed=number + 1, std=0.3)
    return model


def test_without_tying_the_head_stays_and_merging_gives_the_embedding_a_weight_of_its_own() -> None:
    """PEFT merges into both, which changes its logits."""
    model = two()
    inputs, plain = tiny.batch(model), tiny.gpt2()
    lk.use(model, "a")
    expected = logits(model, inputs)
    plain.transformer.wte.weight = nn.Parameter(tied_total(model, "a"))
    torch.testing.assert_close(expected, logits(plain, inputs), **CLOSE)
    lk.merge(model, "a")
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not model.config.tie_word_embeddings
    lk.unmerge(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model, inputs), expected)


def test_with_tying_both_take_the_pair_and_stay_one_weight(tmp_path: Path) -> None:
    model = two(ensure_weight_tying=True)
    inputs, plain = tiny.batch(model), tiny.gpt2()
    with torch.no_grad():
        plain.transformer.wte.weight.copy_(tied_total(model, "a"))
    lk.use(model, "a")
    expected = logits(model, inputs)
    torch.testing.assert_close(expected, logits(plain, inputs), **CLOSE)
    lk.merge(model, "a")
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    lk.unmerge(model)
    assert torch.equal(logits(model, inputs), expected)


def test_a_tied_pairs_gradients_are_those_of_the_one_weight() -> None:
    model = two(ensure_weight_tying=True)
    inputs, plain = tiny.batch(model), tiny.gpt2()
    pair = host(model).records["b"].draft.pairs["transformer.wte"]
    A, Bt = pair.A.detach().clone().requires_grad_(), pair.Bt.detach().clone().requires_grad_()
    total = plain.transformer.wte.weight.detach() + pair.scale * A @ Bt
    values = {"transformer.wte.weight": total, "lm_head.weight": total}
    torch.func.functional_call(plain, values, (), inputs, tie_weights=False).logits.square().sum().backward()
    model(**inputs).logits.square().sum().backward()
    for mine, reference in zip(lk.parameters(model, "b"), (A, Bt), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-3, rtol=1e-3)
    assert len(lk.parameters(model, "b")) == 2


def test_tied_pairs_route_and_weigh() -> None:
    model = two(ensure_weight_tying=True)
    inputs = tiny.batch(model, rows=3)
    with lk.route(model, ["a", None, "b"]):
        mixed = logits(model, inputs)
    for row, name in enumerate(("a", None, "b")):
        with lk.use(model, name):
            alone = logits(model, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(mixed[row : row + 1], alone, **CLOSE)
    weights = {"a": 0.5, "b": 0.7}
    with lk.use(model, weights):
        weighed = logits(model, inputs)
    lk.merge(model, weights)
    torch.testing.assert_close(logits(model, inputs), weighed, **CLOSE)


def test_one_pair_for_an_encoder_a_decoder_and_their_head(tmp_path: Path) -> None:
    model = tiny.t5()
    lk.attach(model, lk.LoRA(r=2, alpha=3, target_modules=["embed_tokens"], ensure_weight_tying=True), seed=0)
    grow(model, "default", std=0.3)
    draft = host(model).records["default"].draft
    ((path, pair),) = draft.pairs.items()
    assert {path, *draft.tied} == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    plain, inputs = tiny.t5(), tiny.batch(model)
    with torch.no_grad():
        plain.shared.weight.add_(pair.scale * pair.A @ pair.Bt)
    expected = logits(model, inputs)
    torch.testing.assert_close(expected, logits(plain, inputs), **CLOSE)
    lk.save(model, tmp_path)
    again = tiny.t5()
    lk.load(again, tmp_path)
    assert torch.equal(logits(again, inputs), expected)
    lk.merge(model, "default")
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    assert model.lm_head.weight is model.encoder.embed_tokens.weight


def test_a_merge_of_adapters_of_which_one_is_not_tied_is_right() -> None:
    model = tiny.gpt2()
    lk.attach(model, lk.LoRA(r=2, target_modules=["wte"], ensure_weight_tying=True), name="a")
    lk.attach(model, lk.LoRA(r=2, target_modules=["wte"]), name="b")
    grow(model, "a", 1, 0.3)
    grow(model, "b", 2, 0.3)
    inputs, weights = tiny.batch(model), {"a": 1.0, "b": 0.5}
    with lk.use(model, weights):
        expected = logits(model, inputs)
    lk.merge(model, weights)
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)
    lk.unmerge(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_nothing_is_loaded_into_a_merged_tied_model() -> None:
    model = two(ensure_weight_tying=True)
    lk.merge(model, "a")
    with pytest.raises(AdapterError, match="merged"):
        model.load_state_dict(tiny.gpt2().state_dict())
