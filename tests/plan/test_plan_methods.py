"""Plans of methods other than LoRA: trained numbers without the head, whatever of it a method trains itself."""

import torch

import lorakit as lk
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.houlsby import HoulsbyAdapter


def test_the_papers_counts_beside_a_classifiers_head() -> None:
    methods = [HoulsbyAdapter(r=8), BitFit(), FullFineTuning(top_layers=2), lk.LoRA(r=8)]
    found = lk.plan("roberta-base", methods, length=16)
    full, *rows = found.rows
    head = 768 * 768 + 768 + 768 * 2 + 2
    assert [row.method for row in rows[:3]] == ["HoulsbyAdapter r=8", "BitFit", "FullFineTuning top_layers=2"]
    assert [row.trainable for row in rows[:3]] == [313_536, 102_144, 2 * 7_087_872]
    assert {row.head for row in rows} == {head}
    assert all(row.memory is not None and row.memory.peak < full.memory.peak for row in rows)
    assert all(0 < row.flops_ratio < 1 for row in rows)


def test_a_deep_model_is_followed_by_its_short_forms() -> None:
    row = lk.plan("gpt3-175b", HoulsbyAdapter(r=1), batch=1, length=64).rows[1]
    assert row.trainable == 7_078_080
    assert row.memory is not None


def test_only_what_is_trained_of_a_head_counts_as_one() -> None:
    cases = [
        lk.LoRA(r=1, bias="all", modules_to_save=[]),
        lk.LoRA(r=1, target_modules=["q"], modules_to_save=["pooler"]),
    ]
    _, *rows = lk.plan("minilm-l6", cases, length=16, task="sequence-classification").rows
    assert [row.head for row in rows] == [2, 0]  # the head's own biases are among all of them
    biases = 6 * (7 * 384 + 1536) + 384 + 384  # of layers and norms, of the embeddings' norm, of the pooler
    pairs = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) + (384 + 384)
    assert rows[0].trainable == pairs + biases
    assert rows[1].trainable == 6 * (384 + 384) + 384 * 384 + 384


def test_methods_that_adapt_together_have_one_row() -> None:
    both = [lk.LoRA(r=2, target_modules=["q", "v"]), lk.PrefixTuning(prefix_length=3)]
    _, alone, together = lk.plan("gpt2", [both[0], both], length=16).rows
    assert together.method == "LoRA r=2 on q, v + PrefixTuning prefix_length=3"
    assert together.trainable == alone.trainable + 2 * 12 * 768 * 3


def test_a_method_that_writes_no_text_is_counted() -> None:
    found = lk.plan("smollm2-135m", [lk.Warp(labels=2), lk.LoRA(r=1)], length=16)
    assert found.rows[1].memory is None
    assert found.rows[2].memory is not None
    assert any("Warp" in note for note in found.notes)


def test_a_start_from_tokens_has_the_type_that_is_asked() -> None:
    both = [lk.PrefixTuning(prefix_length=2, tokens=[1, 2]), lk.PrefixTuning(prefix_length=2)]
    _, one, other = lk.plan("gpt2", both, dtype="bfloat16", length=16).rows
    assert one.checkpoint_bytes == other.checkpoint_bytes


def test_deberta_has_its_convolution() -> None:
    from lorakit.plan.source import find

    model = find("deberta-xxl", None).build(torch.float32)
    assert sum(one.numel() for path, one in model.named_parameters() if ".conv." in path) == 3 * 1536**2 + 3 * 1536
