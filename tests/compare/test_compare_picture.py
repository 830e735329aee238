"""The picture: labels cover nothing, the same bytes each time; sentences about sweeps; tables."""

import random
import re
from pathlib import Path

import pytest

from lorakit.analyze.draw import drawn
from lorakit.compare.arms import Arm
from lorakit.compare.baselines import majority_outcome, with_examples
from lorakit.compare.findings import findings
from lorakit.compare.labels import overlap, place
from lorakit.compare.outcome import FAILED, Outcome
from lorakit.compare.picture import figure_2
from lorakit.compare.result import BASE, METHOD, Comparison, Row, figure_of
from lorakit.compare.shared import hold_out
from lorakit.compare.table import tables_of, to_csv
from lorakit.data import ChatExample, Dataset, LabelExample, PromptExample
from lorakit.data.examples import Message
from lorakit.errors import DataError


def row(label, quality, trained=1000, family=None, swept=None, **values):
    runs = [Outcome(seed, 1e-3, quality=quality + d, trained=trained) for seed, d in enumerate((-0.01, 0.0, 0.012))]
    return Row(label, METHOD, family or label, None, swept, 1e-3, runs=runs, **values)


def comparison(rows, **values):
    given = {"quality": "accuracy", "higher": True, "middle": "median", "base_parameters": 10**6} | values
    return Comparison(Path("out"), "model", "train.tsv", "sequence-classification", rows=rows, **given)


def crowd(count, seed):
    draw = random.Random(seed)
    sizes = [(1, 2, 4, 8)[n % 4] for n in range(count)]
    return [
        row(f"{'LoRA' if n % 2 else 'prefix layer'} r={size} {n}", draw.gauss(0.9, 0.02), 10 ** draw.uniform(4, 7.3) // 1,
            family=f"family {n % 5}", swept=("r", float(size)))
        for n, size in enumerate(sizes)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_labels_do_not_overlap(seed):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    base = [Row("base, zero-shot", BASE, "b", runs=[Outcome(0, quality=0.91)])]
    far = [Row("most frequent class", BASE, "c", runs=[Outcome(0, quality=0.1)])]
    figure = figure_2(comparison([*base, *far, *crowd(20, seed)]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    boxes = [text.get_window_extent(canvas.get_renderer()).extents for text in axes.texts]
    assert len(boxes) == 21
    frame = axes.get_window_extent().extents
    for at, one in enumerate(boxes):
        assert frame[0] - 1 <= one[0]
        assert one[2] <= frame[2] + 1
        assert all(overlap(one, other) < 1 for other in boxes[at + 1 :])
    assert "most frequent class 0.1" in axes.get_title(loc="right")
    assert axes.get_ylim()[0] > 0.5


def test_a_free_place_is_taken_where_there_is_one():
    frame = (0, 0, 400, 300)
    points = [(200 + dx, 150 + dy) for dx in (-4, 0, 4) for dy in (-3, 3)]
    boxes = place(points, [(60, 12)] * 6, [(195, 145, 205, 155)], frame)
    assert all(overlap(a, b) == 0 for n, a in enumerate(boxes) for b in boxes[n + 1 :])
    assert all(overlap(box, (195, 145, 205, 155)) == 0 for box in boxes)


def test_the_picture_is_the_same_each_time_and_holds_its_labels():
    found = comparison([row("LoRA $r$=1", 0.9, 1000), row("full", 0.91, 10**6)])
    first, again = (drawn(lambda: figure_2(found), "svg") for _ in range(2))
    assert first == again
    assert b"LoRA $r$=1" in first
    assert drawn(lambda: figure_2(comparison([row("alone", 0.5, 10)])), "png").startswith(b"\x89PNG")


def sweep(*values, **more):
    rows = [row(f"prefix {n}", value, family="prefix", swept=("length", float(n))) for n, value in values]
    arms = [Arm(one.label, "prefix", None, one.swept, {}, (1e-3,)) for one in rows]
    return next(iter(findings(comparison(rows, **more), arms)))


def test_sweeps_are_told():
    assert sweep((4, 0.8), (16, 0.85), (64, 0.82)).endswith("not monotonic: worse from 16 to 64.")
    assert "0.8 at 4, 0.85 at 16, 0.82 at 64" in sweep((64, 0.82), (4, 0.8), (16, 0.85))
    assert sweep((4, 0.8), (16, 0.8), (64, 0.82)).endswith("monotonic: no larger size is worse.")
    assert sweep((4, 0.9), (16, 0.8)).endswith("every larger size is worse.")
    assert sweep((4, 0.9), (16, 0.8), higher=False).endswith("monotonic: no larger size is worse.")


def test_a_rate_at_the_edge_is_told():
    one = row("lora", 0.9, tried={"0.001": 0.9, "0.0003": 0.8})
    arm = Arm("lora", "lora", None, None, {}, (3e-4, 1e-3, 3e-3))
    assert "0.001, is at the edge of those tried (0.0003, 0.001)" in findings(comparison([one]), [arm])[0]
    inside = row("lora", 0.9, tried={"0.001": 0.9, "0.0003": 0.8, "0.003": 0.1})
    assert findings(comparison([inside]), [arm]) == []


def test_tables_and_csv():
    broken = Row("broken", METHOD, "broken", runs=[Outcome(0, status=FAILED, reason="no")])
    timed = row("lora", 0.9, latency=[{"batch": 1, "over": 1.031, "merged_over": 0.999}])
    found = comparison([timed, broken])
    quality, cost = tables_of(found)
    assert quality.columns == ["method", "accuracy", "±", "seeds", "trained", "learning rate", "status"]
    assert quality.rows[0] == ["lora", 0.9, "0.011", 3, 1000, "0.001", "done"]
    assert quality.rows[1] == ["broken", None, None, 0, None, None, "failed"]
    assert cost.rows[0][-2:] == ["+3.1 %", "−0.1 %"]
    assert "latency_ratio_batch_1,latency_ratio_merged_batch_1" in to_csv(found)
    assert re.search(r"^broken,method,failed,accuracy,,", to_csv(found), re.MULTILINE)


def test_figures_are_those_of_the_seeds():
    found = figure_of([1.0, None, 2.0, 6.0])
    assert (found.mean, found.median, found.least, found.most, found.seeds) == (3.0, 2.0, 1.0, 6.0, 3)
    assert found.spread == pytest.approx(7**0.5)
    assert figure_of([2.0]).spread is None
    assert figure_of([None]) is None


def test_the_best_is_the_smaller_of_equals():
    rows = [row("large", 0.9, 5000), row("small", 0.9, 10), row("worse", 0.8, 1)]
    assert comparison(rows).best is rows[1]
    assert comparison(rows, higher=False).best is rows[2]


def prompts(*texts):
    return Dataset(tuple(PromptExample(t, "a", ("a",), n + 1) for n, t in enumerate(texts)), "e2e", "x")


def test_rows_of_one_prompt_stay_together():
    whole = prompts("a", "b", "a", "c", "b", "d", "e", "f")
    kept, held = hold_out(whole, 0.5, 0)
    assert len(kept) + len(held) == 8
    assert not {one.prompt for one in kept.examples} & {one.prompt for one in held.examples}
    assert len({one.prompt for one in held.examples}) == 3
    with pytest.raises(DataError, match="leaves nothing to train on"):
        hold_out(prompts("a", "a"), 0.1, 0)


def test_examples_go_before_a_prompt():
    found = with_examples(prompts("q>"), [PromptExample("p>", "x", ("x",), 1)])
    assert found.examples[0].prompt == "p>x\n\nq>"
    chat = ChatExample((Message("system", "s"), Message("user", "u"), Message("assistant", "a")), 1)
    shot = ChatExample((Message("system", "t"), Message("user", "v"), Message("assistant", "b")), 1)
    turns = with_examples(Dataset((chat,), "messages", "x"), [shot]).examples[0].messages
    assert [turn.content for turn in turns] == ["s", "v", "b", "u", "a"]


def test_the_most_frequent_class_is_of_training():
    def labels(*classes):
        return Dataset(
            tuple(LabelExample("t", None, c, n) for n, c in enumerate(classes)), "text-label", "x", ["a", "b"]
        )

    found = majority_outcome(labels(1, 1, 0), labels(0, 0, 0, 1), ["accuracy", "matthews"], "accuracy")
    assert found.metrics == {"accuracy": 0.25, "matthews": 0.0}
