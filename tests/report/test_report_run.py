"""From metrics.jsonl and a summary to a report."""

import json
import math

import numpy as np
import pytest

from lorakit.errors import DataError
from lorakit.report import read_metrics, run_report, write_report
from lorakit.report.text import duration, number, one_line, percent, size

SUMMARY = {
    "trainable_parameters": 460_800,
    "total_parameters": 134_975_808,
    "peak_memory_bytes": 2_310_000_000,
    "adapter_bytes": 1_850_000,
    "model_bytes": 538_000_000,
    "seconds": 204.3,
    "tokens_per_second": 812.4,
    "best_step": 40,
}


def rows() -> list[dict]:
    training = [
        {"step": step, "loss": 3 / step, "lr": 1e-3, "tokens_per_second": 800.0 + step, "grad_norm": 1.0, "epoch": 0.5}
        for step in range(1, 61)
    ]
    evaluation = [
        {
            "step": step,
            "eval_loss": 2 / step + step / 900,
            "eval_f1": step / 100,
            "eval_bleu": step,
            "eval_seconds": 3.0,
        }
        for step in (20, 40, 60)
    ]
    return training + evaluation


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 2.5}\n\n{"step": 2, "loss": NaN}\n'
    for torn in ("", '{"step": 3, "lo', '{"step": 3, "note": "é'.encode()[:-1].decode("latin-1"), "\0\0\0"):
        path.write_bytes(whole.encode() + torn.encode("latin-1"))
        read = read_metrics(path)
        assert [row["step"] for row in read] == [1, 2]
        assert math.isnan(read[1]["loss"])


@pytest.mark.parametrize("bad", ["{broken", "[1, 2]", "7", "\udcff"])
def test_a_damaged_line_in_between_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad.encode(errors="surrogateescape") + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match="one JSON object") as caught:
        read_metrics(path)
    assert caught.value.line == 2
    assert caught.value.source == str(path)


def test_metrics_that_are_missing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl"):
        read_metrics(tmp_path / "no.jsonl")


def test_the_headline_figures():
    facts = {fact[0]: tuple(fact[1:]) for fact in run_report(rows(), SUMMARY).facts}
    assert facts == {
        "Trained parameters": ("0.341 %", "460,800 of 134,975,808"),
        "Adapter on disk": ("1.85 MB", "0.344 % of the model's 538 MB"),
        "Peak memory": ("2.31 GB", ""),
        "Time": ("3 min 24 s", ""),
        "Speed": ("812 tokens/s", ""),
        "Best step": ("40", ""),
    }


def test_the_claim_is_the_loss_at_the_step_kept():
    report = run_report(rows(), SUMMARY)
    assert report.claim == "Training 0.341 % of the parameters took the evaluation loss from 0.1222 to 0.09444."
    assert run_report(rows(), SUMMARY, claim="Mine.").claim == "Mine."
    assert run_report([{"step": 1, "eval_loss": 1.0}]).claim == ""


def test_the_curves():
    curves = {curve.title: curve for curve in run_report(rows(), SUMMARY).curves}
    assert list(curves) == ["Loss", "Evaluation", "Evaluation: bleu", "Learning rate", "Gradient norm", "Speed"]
    assert list(curves["Loss"].series["evaluation"]) == [(20, 2 / 20 + 20 / 900), (40, 0.05 + 40 / 900), (60, 0.1)]
    assert len(curves["Loss"].series["training"]) == 60
    assert list(curves["Evaluation"].series) == ["f1"]
    assert curves["Loss"].marks == ((40.0, "kept: step 40"),)


def test_a_resumed_step_counts_once_as_last_written():
    again = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 3, "loss": 7.0}, {"step": 2, "loss": 1.0}]
    assert run_report(again).curves[0].series["training"] == [(1, 9.0), (2, 1.0), (3, 7.0)]


def test_the_tables():
    summary = SUMMARY | {"before": {"exact_match": 0.1, "f1": 0.5}, "after": {"exact_match": 0.85, "bleu": 30}}
    before_after, during = run_report(rows(), summary).tables
    assert before_after.rows == [
        ["exact match", 0.1, 0.85, "+0.7500"],
        ["f1", 0.5, None, None],
        ["bleu", None, 30, None],
    ]
    assert during.columns == ["Metric", "Step 20", "Step 40 (kept)", "Step 60"]
    assert [list(row) for row in during.rows][1:] == [["f1", 0.2, 0.4, 0.6], ["bleu", 20, 40, 60]]


def test_numbers_that_are_not_finite_are_counted_and_the_page_stands(tmp_path):
    sick = [{"step": step, "loss": math.nan if step > 5 else 1.0, "grad_norm": math.inf} for step in range(1, 9)]
    sick += [{"step": 8, "eval_loss": math.nan}, {"step": 9, "eval_loss": -math.inf}]
    report = run_report(
        sick, {"peak_memory_bytes": math.nan, "seconds": -1, "best_step": math.inf, "before": {"a": math.nan}}
    )
    assert report.warnings == [
        "loss was no finite number 3 times, first at step 6; those points are not drawn.",
        "grad_norm was no finite number 8 times, first at step 1; those points are not drawn.",
        "eval_loss was no finite number 2 times, first at step 8; those points are not drawn.",
    ]
    assert report.facts == []
    text = write_report(tmp_path / "r.html", report).read_text(encoding="utf-8")
    assert text.count("<svg") == 1
    assert ">NaN<" in text
    assert ">−∞<" in text


@pytest.mark.parametrize(
    "odd",
    [
        [],
        [{}],
        [{"loss": 1.0}],
        [{"step": None, "loss": 1.0}, {"step": "2", "loss": "x"}],
        [{"step": True, "loss": [1]}, {"step": 10**400, "loss": 10**400}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": {"a": 1}}, {"step": 2, "eval_": 3}],
    ],
)
def test_rows_without_numbers_make_a_page_without_curves(tmp_path, odd):
    report = run_report(odd, {"trainable_parameters": "many", "total_parameters": 0, "before": 3, "after": None})
    assert report.curves == []
    assert "<svg" not in write_report(tmp_path / "r.html", report).read_text(encoding="utf-8")


def test_a_runs_folder(tmp_path):
    folder = tmp_path / "sql"
    folder.mkdir()
    assert run_report(folder).title == "sql"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "recipe.yaml").write_text("model: é\n", encoding="utf-8")
    report = run_report(folder, SUMMARY, title="Mine", warnings=["Slow."])
    assert (report.title, report.recipe_yaml, report.warnings) == ("Mine", "model: é\n", ["Slow."])
    assert report.curves == run_report(rows(), SUMMARY).curves
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="recipe"):
        run_report(folder)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (np.int64(4000), "4,000"),
        (np.float32(0.5), "0.5000"),
        (0.0, "0.000"),
        (0.83594, "0.8359"),
        (-31.2, "−31.20"),
        (12345.6, "12,346"),
        (999.96, "1,000"),
        (2e-5, "2.000e-05"),
        (-2e-5, "−2.000e-05"),
        (1e15, "1.000e+15"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        ("as it is", "as it is"),
    ],
)
def test_numbers_as_read(value, shown):
    assert number(value) == shown


def test_sizes_shares_and_times_as_read():
    assert [size(count) for count in (0, 999, 999_600, 2_210_000, 538e6, 3.5e12)] == [
        "0 bytes",
        "999 bytes",
        "1 MB",
        "2.21 MB",
        "538 MB",
        "3.5 TB",
    ]
    assert percent(1, 3) == "33.3 %"
    assert [duration(time) for time in (0.25, 59.7, 204.3, 3599.7, 7322)] == [
        "0.25 s",
        "1 min 0 s",
        "3 min 24 s",
        "1 h 0 min",
        "2 h 2 min",
    ]
    assert one_line("a\n b\x00" + "c" * 50, 10) == "a b␀ccccc…"
