"""Plans of methods other than LoRA: trained numbers without the head, whatever of it a method trains itself."""

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
