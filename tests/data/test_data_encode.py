"""Prompts, targets and labels -> ids; checked against the tokenizer itself and transformers' own collators."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from lorakit.data import (
    IGNORE,
    Dataset,
    Encoded,
    LabelExample,
    PromptExample,
    collate,
    describe,
    encode,
    encode_all,
    prompt_ids,
    prompt_text,
)
from lorakit.errors import DataError, UsageError

EXAMPLE = PromptExample("What is the capital?\n", "Paris, é", ("Paris, é",), 3)
PAIR = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")


def causal(example, tokenizer, max_length=None, **options):
    return encode(example, tokenizer, task="causal-lm", max_length=max_length, **options)


@pytest.mark.parametrize("post", [None, "<s> $A", "<s> $A </s>", "$A </s>", "[CLS] $A [SEP]"])
@pytest.mark.parametrize("start", ["", "<s>"])
def test_prompt_without_loss_completion_and_end_with(make_tokenizer, post, start):
    tokenizer = make_tokenizer(post=post, sep_token="[SEP]", cls_token="[CLS]")
    example = PromptExample(start + EXAMPLE.prompt, EXAMPLE.completion, (), 3)
    row = causal(example, tokenizer)
    begin = tokenizer.bos_token_id
    learned = [label for label in row.labels if label != IGNORE]
    assert tokenizer.decode(learned) == "Paris, é</s>"
    assert row.labels == [IGNORE] * (len(row.labels) - len(learned)) + row.input_ids[-len(learned) :]
    assert row.input_ids.count(begin) == (1 if start or (post or "").startswith("<s>") else 0)
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.sep_token_id not in row.input_ids
    assert row.input_ids[: -len(learned)] == prompt_ids(example, tokenizer)
    assert prompt_text(example, tokenizer) == example.prompt


def test_the_border_is_the_same_whatever_follows(make_tokenizer):
    """A tokenizer would merge "Pa" + "ris" if both were read as one text; generation never sees that token."""
    tokenizer = make_tokenizer()
    example = PromptExample("It is Pa", "ris", (), 1)
    row = causal(example, tokenizer)
    given = tokenizer("It is Pa")["input_ids"]
    assert row.input_ids[: len(given)] == given
    assert row.input_ids != [*tokenizer("It is Paris")["input_ids"], tokenizer.eos_token_id]


def test_an_end_token_is_needed(make_tokenizer):
    with pytest.raises(DataError, match="no end-of-sequence token"):
        causal(EXAMPLE, make_tokenizer(eos_token=None))


def test_a_long_row_is_an_error_or_loses_the_start_of_its_prompt(make_tokenizer):
    tokenizer = make_tokenizer(post="<s> $A")
    whole = causal(EXAMPLE, tokenizer)
    size, learned = len(whole.input_ids), sum(label != IGNORE for label in whole.labels)
    assert causal(EXAMPLE, tokenizer, size) == whole
    with pytest.raises(DataError, match=rf"line 3, field 'prompt': the row has {size} tokens, the most is {size - 1}"):
        causal(EXAMPLE, tokenizer, size - 1)
    with pytest.raises(DataError, match="the most is 5"):
        causal(EXAMPLE, make_tokenizer(model_max_length=5))
    cut = causal(EXAMPLE, tokenizer, size - 2, truncate=True)
    assert cut.input_ids == [tokenizer.bos_token_id, *whole.input_ids[3:]]
    assert cut.labels == [IGNORE, *whole.labels[3:]]
    for limit in range(2, learned + 2):
        cut = causal(EXAMPLE, tokenizer, limit, truncate=True)
        assert len(cut.input_ids) == len(cut.labels) == limit
        assert cut.input_ids[0] == tokenizer.bos_token_id
        kept = [label for label in cut.labels if label != IGNORE]
        assert kept == [label for label in whole.labels if label != IGNORE][: len(kept)] != []


def test_seq2seq_is_what_the_tokenizer_gives(make_tokenizer):
    tokenizer = make_tokenizer(post="$A </s>")
    row = encode(EXAMPLE, tokenizer, task="seq2seq", max_length=None)
    reference = tokenizer(EXAMPLE.prompt, text_target=EXAMPLE.completion)
    assert (row.input_ids, row.labels) == (reference["input_ids"], reference["labels"])
    assert prompt_ids(EXAMPLE, tokenizer, task="seq2seq") == row.input_ids
    bare = encode(EXAMPLE, make_tokenizer(), task="seq2seq", max_length=None)
    assert bare.labels == row.labels
    with pytest.raises(DataError, match="field 'prompt'"):
        encode(EXAMPLE, tokenizer, task="seq2seq", max_length=4)
    for fitted in (tokenizer, make_tokenizer()):
        cut = encode(EXAMPLE, fitted, task="seq2seq", max_length=4, truncate=True)
        assert (len(cut.input_ids), len(cut.labels), cut.labels[-1]) == (4, 4, tokenizer.eos_token_id)


def test_classification_is_what_the_tokenizer_gives(make_tokenizer):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = make_tokenizer(*PAIR, model_input_names=names)
    row = encode(LabelExample("Yes", "No maybe", 1, 3), tokenizer, task="sequence-classification", max_length=None)
    reference = tokenizer("Yes", "No maybe")
    assert (row.input_ids, row.token_type_ids) == (reference["input_ids"], reference["token_type_ids"])
    assert (row.labels, row.line, set(row.token_type_ids)) == (1, 3, {0, 1})
    long = LabelExample("Yes", "No maybe" * 20, 1, 3)
    with pytest.raises(DataError, match="line 3, field 'text'"):
        encode(long, tokenizer, task="sequence-classification", max_length=9)
    cut = encode(long, tokenizer, task="sequence-classification", max_length=9, truncate=True)
    assert cut.input_ids == tokenizer("Yes", "No maybe" * 20, truncation=True, max_length=9)["input_ids"]
    with pytest.raises(DataError, match="field 'label'"):
        encode(LabelExample("a", None, None, 3), tokenizer, task="sequence-classification", max_length=9)


def test_all_rows_with_progress_and_several_faults_in_one_message(make_tokenizer):
    tokenizer, calls = make_tokenizer(), []
    data = Dataset(tuple(PromptExample("a", "b", (), n) for n in range(1, 251)), "prompt-completion", "x.jsonl")
    rows = encode_all(
        data, tokenizer, task="causal-lm", max_length=None, progress=lambda done, total: calls.append((done, total))
    )
    assert [row.line for row in rows] == list(range(1, 251))
    assert calls == [(100, 250), (200, 250), (250, 250)]
    bad = (data.examples[0], PromptExample("a" * 90, "b", (), 2), PromptExample("a", None, (), 3))
    with pytest.raises(DataError, match=r"x\.jsonl: 2 bad rows") as caught:
        encode_all(Dataset(bad, "prompt-completion", "x.jsonl"), tokenizer, task="causal-lm", max_length=20)
    assert "line 2, field 'prompt'" in str(caught.value)
    assert "line 3, field 'completion'" in str(caught.value)
    assert caught.value.line == 2


def test_data_that_do_not_fit_the_task(make_tokenizer):
    data = Dataset((EXAMPLE,), "e2e", "x.txt")
    with pytest.raises(DataError, match=r"x\.txt: the task sequence-classification needs texts with labels, .* e2e"):
        encode_all(data, make_tokenizer(), task="sequence-classification", max_length=None)
    with pytest.raises(DataError, match="empty"):
        encode_all(Dataset((), "e2e", "x.txt"), make_tokenizer(), task="causal-lm", max_length=None)
    with pytest.raises(UsageError, match="task must be one of"):
        encode(EXAMPLE, make_tokenizer(), task="poetry", max_length=None)


# Not seq2seq on the left: transformers pads targets where the sources are padded, but a decoder begins at the left.
@pytest.mark.parametrize(("task", "side"), [("causal-lm", "right"), ("causal-lm", "left"), ("seq2seq", "right")])
def test_padding_is_that_of_transformers(make_tokenizer, task, side):
    tokenizer = make_tokenizer(padding_side=side)
    rows = [
        encode(PromptExample("Yes " * n, "No " * (5 - n), (), n), tokenizer, task=task, max_length=None)
        for n in (1, 2, 4)
    ]
    batch = collate(rows, pad_id=tokenizer.pad_token_id, task=task, side=side)
    reference = DataCollatorForSeq2Seq(tokenizer)([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    assert batch.keys() == reference.keys()
    for key, value in batch.items():
        assert torch.equal(value, reference[key]), key


def test_padding_of_labelled_pairs_is_that_of_transformers(make_tokenizer):
    tokenizer = make_tokenizer(*PAIR, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    examples = [LabelExample("Yes", "No maybe", 1, 1), LabelExample("Paris", "What is the capital", 0, 2)]
    rows = [encode(row, tokenizer, task="sequence-classification", max_length=None) for row in examples]
    batch = collate(rows, pad_id=tokenizer.pad_token_id, task="sequence-classification")
    features = [{"input_ids": row.input_ids, "token_type_ids": row.token_type_ids, "label": row.labels} for row in rows]
    reference = DataCollatorWithPadding(tokenizer)(features)
    assert batch.keys() == reference.keys()
    for key, value in batch.items():
        assert torch.equal(value, reference[key]), key
        assert value.dtype == reference[key].dtype
    scores = collate([Encoded([1], 0.5, 1), Encoded([1], 2.0, 1)], pad_id=0, task="sequence-classification")["labels"]
    assert (scores.tolist(), scores.dtype) == ([0.5, 2.0], torch.float32)


def test_seq2seq_targets_are_padded_right_even_when_sources_are_padded_left():
    batch = collate([Encoded([5], [6, 7], 1), Encoded([5, 5], [6], 2)], pad_id=0, task="seq2seq", side="left")
    assert batch["input_ids"].tolist() == [[0, 5], [5, 5]]
    assert batch["labels"].tolist() == [[6, 7], [6, IGNORE]]


def test_collate_refuses_what_it_cannot_batch():
    row = Encoded([1, 2], [IGNORE, 2], 1)
    for rows, options in (([], {}), ([row], {"side": "up"}), ([row], {"task": "sequence-classification"})):
        with pytest.raises(UsageError):
            collate(rows, **{"pad_id": 0, "task": "causal-lm", **options})


def test_counts_for_the_report():
    rows = [Encoded([1] * n, [IGNORE] * (n - 1) + [1], n) for n in (2, 4)]
    data = Dataset((EXAMPLE, EXAMPLE), "e2e", "x.txt")
    summary = describe(data, rows, batch_size=2)
    assert (summary.rows, summary.tokens, summary.loss_tokens, summary.longest) == (2, 6, 2, 4)
    assert summary.padding_share == pytest.approx(2 / 8)
    with pytest.raises(UsageError, match="2 encoded rows"):
        describe(data, rows[:1])
