"""The grammar: enough shapes, held-out wordings that training never sees, answers that no constant gives."""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from random import Random

import pytest

from lorakit.demo import grammar, wordings
from lorakit.demo.answers import same_answer
from lorakit.demo.database import DATABASE_SEEDS, fill
from lorakit.demo.grammar import SHAPES, Question, questions
from lorakit.demo.prompts import completion, example, few_shot_examples, few_shot_prompt, prompt
from lorakit.demo.slots import expand, plural
from lorakit.demo.wordings import Wordings
from lorakit.errors import UsageError

PINNED = (
    "Look up the maximum rent for our shops.",
    "SELECT MAX(rent) FROM shop",
)
TRAIN, HELDOUT = 1600, 400


@pytest.fixture(scope="module")
def databases() -> Iterator[list[sqlite3.Connection]]:
    opened = [fill(seed) for seed in DATABASE_SEEDS]
    yield opened
    for conn in opened:
        conn.close()


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return questions("train", TRAIN)


@pytest.fixture(scope="module")
def heldout() -> list[Question]:
    return questions("heldout", HELDOUT)


def _skeleton(template: str) -> str:
    """A wording without the names of its slots, in small letters."""
    return re.sub(r"\{\w+\}", "_", template).lower()


def test_there_are_enough_shapes_with_enough_wordings() -> None:
    assert len(SHAPES) >= 28
    assert len({shape.name for shape in SHAPES}) == len({shape.sql for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        assert len(set(shape.wordings.train)) >= 4, shape.name
        assert len(set(shape.wordings.heldout)) >= 2, shape.name


def test_no_wording_stands_on_both_sides() -> None:
    seen = {_skeleton(template) for shape in SHAPES for template in shape.wordings.train}
    held = {_skeleton(template) for shape in SHAPES for template in shape.wordings.heldout}
    assert not seen & held


def test_frames_and_phrases_are_disjoint_by_themselves() -> None:
    shared = [value for value in vars(wordings).values() if isinstance(value, Wordings)]
    assert len(shared) >= 20
    seen = {_skeleton(part) for group in shared for part in group.train}
    held = {_skeleton(part) for group in shared for part in group.heldout}
    assert not seen & held


def test_wordings_cross_train_with_train_and_heldout_with_heldout() -> None:
    crossed = Wordings(("A <if>.", "B <if>?"), ("C <if>.",)).cross(Wordings(("x", "y"), ("{z}",)))
    assert crossed == Wordings(("A x.", "A y.", "B x?", "B y?"), ("C {z}.",))
    assert crossed.rename(z="{other}").heldout == ("C {other}.",)


def test_no_heldout_question_is_asked_in_training(train: list[Question], heldout: list[Question]) -> None:
    assert not {question.text for question in train} & {question.text for question in heldout}
    assert not {question.template for question in train} & {question.template for question in heldout}


def test_texts_are_unique_whole_and_spread_over_the_shapes(train: list[Question], heldout: list[Question]) -> None:
    for made, n in ((train, TRAIN), (heldout, HELDOUT), (questions("heldout", 128), 128)):
        assert len(made) == len({question.text for question in made}) == n
        counts = Counter(question.shape for question in made)
        assert len(counts) == len(SHAPES)
        if n <= HELDOUT // 2:
            assert max(counts.values()) - min(counts.values()) <= 1
        for question in made:
            assert not re.search(r"[{}\[\]|]", question.text + question.sql), question
            assert question.text[0].isupper()
            assert question.text[-1] in ".?"


def test_wordings_take_turns(train: list[Question], heldout: list[Question]) -> None:
    for split, made in (("train", train), ("heldout", heldout)):
        for shape in SHAPES:
            templates = getattr(shape.wordings, split)
            used = [question.template for question in made if question.shape == shape.name]
            assert set(used) <= set(templates)
            assert len(set(used)) == min(len(used), len(templates)), shape.name  # none twice before all once


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_there_and_differs_between_the_databases(
    split: str, train: list[Question], heldout: list[Question], databases: Sequence[sqlite3.Connection]
) -> None:
    for question in train if split == "train" else heldout:
        first, second = (conn.execute(question.sql).fetchall() for conn in databases)  # without our own guard
        assert any(any(row) for row in first), question
        assert any(any(row) for row in second), question
        assert first != second, question


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        (r" WHERE (?!id)[^()]*$", ""),
        (r" DESC", ""),
        (r" LIMIT \d+", ""),
        (r"DISTINCT ", ""),
        (r" HAVING .*", ""),
        (r" NOT IN ", " IN "),
        (r" > (?=\d)", " < "),
        (r" AND ", " OR "),
        (r"AVG\(", "SUM("),
        (r"MIN\(", "MAX("),
        (r"SELECT (\w+), (\w+) ", r"SELECT \2, \1 "),
    ],
)
def test_a_slip_in_the_sql_is_noticed(
    part: str, instead: str, heldout: list[Question], databases: Sequence[sqlite3.Connection]
) -> None:
    slips = [(re.sub(part, instead, question.sql), question.sql) for question in heldout]
    slips = [(slip, sql) for slip, sql in slips if slip != sql]
    assert len(slips) >= 5
    noticed = sum(not same_answer(slip, sql, databases) for slip, sql in slips)
    assert noticed >= 0.95 * len(slips)  # by chance a filter may keep all rows of a short list


def test_the_same_arguments_give_the_same_questions() -> None:
    assert questions("train", 100, 3) == questions("train", 100, 3)
    assert questions("train", 100, 3) != questions("train", 100, 4)
    first = questions("heldout", 3)[0]
    assert (first.text, first.sql) == PINNED  # pinned: the same in another process and on another machine


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="split"):
        questions("test", 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1"):
        questions("train", 0)


def test_more_questions_than_the_shapes_can_say_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "SHAPES", [shape for shape in SHAPES if shape.name == "count"])
    assert len({question.text for question in questions("heldout", 10)}) == 10  # five tables, two wordings
    with pytest.raises(UsageError, match=r"the shapes give 10\. Ask for fewer"):
        questions("heldout", 11)


def test_blanks_and_choices_are_filled() -> None:
    made = {expand("[a|b] {x} [c|]", {"x": "X"}, Random(seed)) for seed in range(40)}
    assert made == {"a X c", "b X c", "a X ", "b X "}
    assert expand("How many {x} [] are there, [] ?", {"x": "X"}, Random(0)) == "How many X are there,?"
    assert (plural("city"), plural("price"), plural("sale")) == ("cities", "prices", "sales")


def test_prompts_are_the_question_and_end_where_the_answer_begins() -> None:
    question = questions("train", 1)[0]
    text = prompt(question.text)
    assert text == f"Question: {question.text}\nSQL:"
    assert example(question) == {"prompt": text, "completion": completion(question.sql)}
    assert completion("SELECT 1") == " SELECT 1"


def test_few_shot_prompts_show_three_shapes_of_training(heldout: list[Question]) -> None:
    shots = few_shot_examples()
    assert shots == few_shot_examples()
    assert len({shot.shape for shot in shots}) == 3
    assert {shot.template for shot in shots} <= {template for shape in SHAPES for template in shape.wordings.train}
    text = few_shot_prompt("How?", shots)
    with closing(fill(1)) as conn:
        tables = {row[0] for row in conn.execute("SELECT name FROM sqlite_master")}
    assert all(f"{table}(" in text for table in tables)  # the base has not learnt the schema: it is told
    assert text.endswith("\n\nQuestion: How?\nSQL:")
    for shot in shots:
        assert f"Question: {shot.text}\nSQL: {shot.sql}\n\n" in text
