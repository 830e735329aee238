"""Formats found and named, labels, bad rows, folders and hub sets."""

import os
import subprocess
import sys

import pytest

from lorakit.data import (
    ChatExample,
    Columns,
    DataConfig,
    LabelExample,
    Message,
    PromptExample,
    group_references,
    load_examples,
    references_of,
    sample,
)
from lorakit.errors import DataError, UsageError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_prompt_completion_with_references_and_own_columns(jsonl):
    data = load_examples(jsonl({"prompt": "a", "completion": "b", "references": ["c", "b"]}))
    assert data.format == "prompt-completion"
    assert data.examples == (PromptExample("a", "b", ("b", "c"), 1),)
    path = jsonl({"question": "a", "answer": "b"})
    assert load_examples(path, columns=Columns(prompt="question", completion="answer")).examples[0].prompt == "a"
    assert load_examples(path, columns=Columns("question", "answer"), format="prompt/completion").examples


def test_chats_of_both_kinds(jsonl):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    joined = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": parts}]}
    expected = (Message("user", "Hi"), Message("assistant", "Hello"))
    for row in (CHAT, sharegpt, joined):
        data = load_examples(jsonl(row))
        assert (data.format, data.examples) == ("messages", (ChatExample(expected, 1),))
    assert references_of(data.examples[0]) == ("Hello",)


def test_alpaca_with_and_without_input(jsonl):
    first, second = load_examples(
        jsonl(
            {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
            {"instruction": "Hi", "input": "", "output": "Ho"},
        )
    ).examples
    assert first.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert first.prompt.endswith("### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:")
    assert second.prompt.endswith("request.\n\n### Instruction:\nHi\n\n### Response:")


def test_labels_are_mapped_in_sorted_order_and_kept_for_evaluation(jsonl):
    train = load_examples(jsonl({"text": "a", "label": "spam"}, {"text": "b", "label": "ham"}))
    assert train.label_names == ["ham", "spam"]
    assert [example.label for example in train.examples] == [1, 0]
    path = jsonl({"text": "a", "label": "spam"}, {"text": "c", "label": "eggs"}, name="eval.jsonl")
    with pytest.raises(DataError, match=r"line 2, field 'label': label out of range: .*ham, spam.*'eggs'") as caught:
        load_examples(path, label_names=train.label_names)
    assert (caught.value.line, caught.value.field) == (2, "label")


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([10, 9, 9], ["9", "10"], [1, 0, 0]),
        (["1", "0", "1"], ["0", "1"], [1, 0, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([1.0, 2.0, 1.0], ["1", "2"], [0, 1, 0]),
        ([0.5, 2, 3], None, [0.5, 2.0, 3.0]),
        (["0.5", "2", "3"], None, [0.5, 2.0, 3.0]),
    ],
)
def test_numbers_as_labels(jsonl, labels, names, ids):
    data = load_examples(jsonl(*({"text": "x", "label": label} for label in labels)))
    assert (data.label_names, data.regression) == (names, names is None)
    assert [example.label for example in data.examples] == ids


def test_names_hold_for_labels_outside_the_sample_that_limit_draws(jsonl):
    data = load_examples(jsonl(*({"text": "x", "label": n} for n in range(50))), limit=3)
    assert (len(data), len(data.label_names)) == (3, 50)


@pytest.mark.parametrize("label", [2, -1, 7.5, 1e400, "2"])
def test_a_label_out_of_range(jsonl, label):
    path = jsonl({"text": "x", "label": 0}, {"text": "x", "label": label})
    with pytest.raises(DataError, match="line 2, field 'label': label out of range"):
        load_examples(path, label_names=["0", "1"])


def test_ids_of_named_labels(jsonl):
    path = jsonl({"text": "x", "label": 1}, {"text": "x", "label": "no"})
    assert [row.label for row in load_examples(path, label_names=["no", "yes"]).examples] == [1, 0]
    with pytest.raises(DataError, match="out of range"):
        load_examples(jsonl({"text": "x", "label": "one"}), regression=True)
    with pytest.raises(DataError, match="every row has the label"):
        load_examples(jsonl({"text": "x", "label": "one"}))


def test_pairs_are_found(jsonl):
    data = load_examples(
        jsonl(
            {"premise": "p", "hypothesis": "h", "label": 0, "idx": 9}, {"premise": "q", "hypothesis": "i", "label": 1}
        )
    )
    assert data.examples[0] == LabelExample("p", "h", 0, 1)


def test_bad_rows_are_listed_together(jsonl):
    bad = [{"prompt": "x"}, {"prompt": "x", "completion": " "}, {"completion": "y"}, {"prompt": 3, "completion": "y"}]
    with pytest.raises(DataError) as caught:
        load_examples(jsonl({"prompt": "x", "completion": "y"}, *bad))
    text = str(caught.value)
    assert "rows.jsonl: 4 bad rows" in text
    for part in ("line 2, field 'completion'", "line 3, field 'completion'", "line 4, field 'prompt'", "came int"):
        assert part in text
    assert (caught.value.line, caught.value.field) == (2, "completion")


def test_at_most_five_bad_rows_are_listed(jsonl):
    with pytest.raises(DataError, match="5 bad rows") as caught:
        load_examples(jsonl(*[{"prompt": "x"}] * 9))
    assert "line 5" in str(caught.value)
    assert "line 6" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "messages"),
        ({"messages": CHAT["messages"][::-1]}, "messages"),
        ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": ""}]}, "messages[1].content"),
        ({"messages": [CHAT["messages"][0], {"role": "assistant"}]}, "messages[1].content"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [3]}, "messages[0]"),
        ({"prompt": "\ud800", "completion": "x"}, "prompt"),
        ({"prompt": "x", "completion": "y", "references": "z"}, "references"),
        ({"text": "x", "label": None}, "label"),
        ({"text": "x", "label": [1]}, "label"),
        ({"text": "", "label": 1}, "text"),
        ({"mr": "name : X", "ref": ""}, "ref"),
        ({"instruction": "x", "input": 3, "output": "y"}, "input"),
    ],
)
def test_a_bad_row_names_its_field(jsonl, row, field):
    with pytest.raises(DataError) as caught:
        load_examples(jsonl(row))
    assert (caught.value.line, caught.value.field) == (1, field)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt", "a.tsv", "a.parquet"])
def test_an_empty_file(write, name):
    with pytest.raises(DataError, match=rf"{name}: (the data set is empty|it is no readable Parquet)"):
        load_examples(write(name, ""))


def test_unknown_formats_say_what_came(jsonl, write):
    with pytest.raises(DataError, match="rows with foo, bar"):
        load_examples(jsonl({"foo": 1, "bar": 2}))
    with pytest.raises(DataError, match=r"lines of text without \|\|"):
        load_examples(write("a.txt", "hello\n"))
    with pytest.raises(UsageError, match=r"data\.format must be"):
        load_examples(jsonl(CHAT), format="mesages")
    with pytest.raises(UsageError, match=r"glue: and one of cola, .*"):
        load_examples(jsonl(CHAT), format="glue:nope")


def test_rows_without_targets(jsonl, write):
    assert load_examples(jsonl({"prompt": "x"}), targets=False).examples == (PromptExample("x", None, (), 1),)
    assert load_examples(write("a.txt", "Hi\n\nHo\n"), targets=False).examples[1] == PromptExample("Ho", None, (), 3)
    assert load_examples(jsonl({"text": "x"}), targets=False).examples == (LabelExample("x", None, None, 1),)
    assert load_examples(write("b.txt", "name : X||\n"), targets=False).examples[0].completion is None


def test_a_sample_is_the_same_for_a_seed_and_keeps_the_order():
    rows = [PromptExample(str(n), "x", ("x",), n) for n in range(100)]
    drawn = sample(rows, 10, 0)
    assert [row.line for row in drawn] == [5, 33, 38, 49, 51, 53, 61, 62, 65, 97]
    assert sample(rows, 10, 0) == drawn != sample(rows, 10, 1)
    assert sample(rows, 1000, 0) == rows == sample(rows, None, 0)
    with pytest.raises(UsageError, match="at least 1"):
        sample(rows, 0, 0)


def test_a_folder_gives_the_file_of_the_role(write, tmp_path):
    for name in ("train", "dev", "test"):
        write(f"set/{name}.jsonl", f'{{"prompt": "{name}", "completion": "x"}}\n')
    folder = str(tmp_path / "set")
    for role, name in (("train", "train"), ("eval", "dev"), ("test", "test")):
        assert load_examples(folder, split=role).examples[0].prompt == name
    write("set/train.csv", "a\n1\n")
    with pytest.raises(DataError, match="several files"):
        load_examples(folder)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="expected a file for the eval data"):
        load_examples(str(tmp_path / "bare"), split="eval")


def test_sets_that_datasets_wrote(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "several"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for source, role in (("one", "train"), ("several", "eval"), ("rows.parquet", "train")):
        data = load_examples(str(tmp_path / source), split=role)
        assert (data.label_names, [row.label for row in data.examples]) == (["pos", "neg"], [1, 0])
    with pytest.raises(DataError, match="expected a split train"):
        load_examples(str(tmp_path / "several"))


def test_hub_sets_are_named_with_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def answer(name, config):
        asked.append((name, config))
        rows = {
            split: datasets.Dataset.from_dict({"prompt": [split], "completion": ["x"]}) for split in ("train", "dev")
        }
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_examples("owner/name:plain").examples[0].prompt == "train"
    assert load_examples("owner/name", split="eval").examples[0].prompt == "dev"
    assert load_examples("name:plain@dev").examples[0].prompt == "dev"
    assert asked == [("owner/name", "plain"), ("owner/name", None), ("name", "plain")]
    with pytest.raises(DataError, match="expected a split nowhere, came train, dev"):
        load_examples("name@nowhere")


def test_a_hub_set_that_does_not_answer_is_one_clear_error(tmp_path):
    code = (
        "from lorakit.data import load_examples\nfrom lorakit.errors import DataError\n"
        "try: load_examples('nobody/nothing:plain')\nexcept DataError as error: assert 'HF_HUB_OFFLINE' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_room_loads_no_heavy_library():
    code = "import sys, lorakit.data; sys.exit(len({'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_config_refuses_numbers_under_one():
    assert DataConfig(train="x", limit=1).format == "auto"
    for name in ("max_length", "limit", "eval_limit"):
        with pytest.raises(UsageError, match=f"data.{name}"):
            DataConfig(**{name: 0})


def test_references_are_grouped_by_prompt():
    rows = [PromptExample(*row) for row in (("a", "1", ("1",), 1), ("b", "2", ("2",), 2), ("a", "3", ("3", "1"), 3))]
    assert group_references(rows) == [PromptExample("a", "1", ("1", "3"), 1), rows[1]]


def test_e2e_files(shared):
    sizes = {"train": 42_061, "valid": 4_672, "test": 4_693}
    for name, size in sizes.items():
        data = load_examples(str(shared / "e2e" / f"{name}.txt"))
        assert (data.format, len(data)) == ("e2e", size)
    assert data.examples[0].prompt == "name : Blue Spice | Type : coffee shop | area : city centre\n"
    assert data.examples[0].completion == "A coffee shop in the city centre area called Blue Spice ."
    groups = group_references(data.examples)
    assert (len(groups), sum(len(group.references) for group in groups)) == (
        630,
        len({(e.prompt, e.completion) for e in data.examples}),
    )


@pytest.mark.parametrize(
    ("folder", "format", "train", "dev", "names"),
    [
        ("SST-2", "glue:sst2", 67_349, 872, ["0", "1"]),
        ("CoLA", "glue:cola", 8_551, 1_043, ["0", "1"]),
        ("MRPC", "glue:mrpc", 3_668, 408, ["0", "1"]),
        ("RTE", "glue:rte", 2_490, 277, ["entailment", "not_entailment"]),
    ],
)
def test_glue_files_are_told_by_themselves(shared, folder, format, train, dev, names):
    source = str(shared / "glue" / folder)
    found = load_examples(source)
    assert (found.format, len(found), found.label_names) == (format, train, names)
    named = load_examples(source, split="eval", format=format, label_names=names)
    assert len(named) == dev
    unlabelled = load_examples(source, split="test", format=format, targets=False)
    assert {row.label for row in unlabelled.examples} == {None}
    with pytest.raises(DataError, match="it is missing"):
        load_examples(source, split="test", format=format)


def test_a_label_that_is_no_number_is_a_missing_one(jsonl):
    path = jsonl({"text": "x", "label": 0.0}, {"text": "y", "label": 1.0}, {"text": "z", "label": float("nan")})
    with pytest.raises(DataError, match="line 3, field 'label': it is empty"):
        load_examples(path)
