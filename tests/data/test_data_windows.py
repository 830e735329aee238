"""Questions as windows: the labels mark the answer, every part of the context is seen, long questions are refused."""

import json
from itertools import pairwise

import pytest

from lorakit.data import QuestionExample, collate, describe, encode_question, encode_questions, load_examples
from lorakit.errors import DataError, ModelError, UsageError

CONTEXT = "Thank you! What is the capital of France? It is Paris, of course. Yes. " * 6


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(
        "[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=512
    )


def question(text, start=None, asked="What is it?"):
    start = CONTEXT.index(text) if start is None else start
    return QuestionExample(asked, CONTEXT, ((text, start),), "q", 1)


def marked(window):
    first, last = window.row.labels
    return CONTEXT[window.offsets[first][0] : window.offsets[last][1]]


@pytest.mark.parametrize("text", ["Paris", "the capital of France", "Thank", "course. Yes."])
@pytest.mark.parametrize("last", [False, True])
def test_labels_mark_the_answer_in_every_window_that_holds_it(tokenizer, text, last):
    start = CONTEXT.rindex(text) if last else CONTEXT.index(text)
    windows = encode_question(question(text, start), tokenizer, max_length=48, stride=12)
    assert len(windows) > 3
    held = [window for window in windows if window.row.labels != [window.empty, window.empty]]
    assert held
    assert all(marked(window).strip() == text for window in held)
    whole = [
        window
        for window in windows
        if (known := [span for span in window.offsets if span])
        and known[0][0] <= start
        and start + len(text) <= known[-1][1]
    ]
    assert held == whole


def test_windows_cover_the_context_and_overlap(tokenizer):
    windows = encode_question(question("Paris"), tokenizer, max_length=48, stride=12)
    seen = {place for window in windows for span in window.offsets if span for place in range(*span)}
    assert seen >= {place for place, letter in enumerate(CONTEXT) if letter != " "}
    spans = [[span for span in window.offsets if span] for window in windows]
    assert all(len(set(one) & set(other)) == 12 for one, other in pairwise(spans))
    assert all(len(window.row.input_ids) <= 48 for window in windows)
    assert all(window.row.input_ids[window.empty] == tokenizer.cls_token_id for window in windows)
    asked = tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    assert all(window.row.input_ids[1 : 1 + len(asked)] == asked for window in windows)


def test_a_short_context_is_one_window(tokenizer):
    (window,) = encode_question(QuestionExample("Yes?", "It is Paris.", (), "q", 1), tokenizer)
    assert window.row.labels == [window.empty, window.empty] == [0, 0]
    tokenizer.model_max_length = 10**30
    assert len(encode_question(question("Paris"), tokenizer)) == 1


def test_batches_hold_both_ends(tokenizer):
    short = encode_question(QuestionExample("Yes?", "Paris", (("Paris", 0),), "q", 1), tokenizer)
    rows = [window.row for window in (*short, *encode_question(question("Paris"), tokenizer, max_length=48))]
    for side in ("left", "right"):
        batch = collate(rows, pad_id=tokenizer.pad_token_id, task="question-answering", side=side)
        assert batch["labels"].shape == (len(rows), 2)
        ids = [batch["input_ids"][n, place].item() for n, row in enumerate(rows) for place in batch["labels"][n]]
        assert ids == [row.input_ids[place] for row in rows for place in row.labels]


def test_what_leaves_no_room_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"line 1, field 'question'.*no room"):
        encode_question(question("Paris", asked="Why? " * 40), tokenizer, max_length=48)
    with pytest.raises(DataError, match=r"data\.stride repeats 45"):
        encode_question(question("Paris"), tokenizer, max_length=48, stride=45)

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="fast"):
        encode_question(question("Paris"), Slow())


def test_data_sets(tokenizer, write):
    asked = [
        {"id": str(n), "question": "It?", "answers": [{"text": "Paris", "answer_start": CONTEXT.index("Paris")}]}
        for n in range(3)
    ]
    document = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]}
    dataset = load_examples(write("a.json", json.dumps(document)))
    windows = encode_questions(dataset, tokenizer, max_length=48)
    rows = [window.row for several in windows for window in several]
    facts = describe(dataset, rows)
    assert (facts.rows, facts.loss_tokens) == (len(rows), len(rows))
    assert len(rows) > len(dataset)
    from lorakit.data import encode, encode_all

    with pytest.raises(UsageError, match="encode_questions"):
        encode(dataset.examples[0], tokenizer, task="question-answering", max_length=None)
    with pytest.raises(DataError, match="the task causal-lm needs"):
        encode_all(dataset, tokenizer, task="causal-lm", max_length=None)
