"""Recipes: what is read, what is refused and in which words."""

import pytest
import yaml

from lorakit.errors import RecipeError
from lorakit.methods.lora import LoRA
from lorakit.run.document import read_yaml
from lorakit.run.recipe import Recipe, load_recipe, to_mapping, to_yaml

MINIMAL = {"model": "m", "data": {"train": "t.jsonl"}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"name": "lora", "r": 3, "rank_pattern": {"q": 2}, "layers_to_transform": [0, 2], "bias": "all"}},
        {"method": {"target_modules": ".*(q|v)_proj"}, "train": {"clip": None, "max_steps": 5, "lr": "1e-4"}},
        {"evaluate": {"metrics": ["bleu"]}, "generate": {"stop": ["\n", "é"]}, "data": {"columns": {"prompt": "q"}}},
    ],
)  # fmt: skip
def test_a_recipe_goes_to_yaml_and_back(tmp_path, changes):
    recipe = load_recipe({**MINIMAL, **changes})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(to_mapping(recipe)) == recipe
    assert load_recipe(recipe) is recipe


def test_defaults_stand_where_nothing_is_said():
    recipe = load_recipe(MINIMAL)
    assert recipe == Recipe(model="m", data=recipe.data)
    assert recipe.method == LoRA()


def test_numbers_as_people_write_them():
    train = {"lr": "1e-4", "epochs": 2, "max_steps": "7", "warmup": "0.1"}
    found = load_recipe({**MINIMAL, "train": train}).train
    assert (found.lr, found.epochs, found.max_steps, found.warmup) == (1e-4, 2.0, 7, 0.1)


def test_overrides(tmp_path):
    document = {**MINIMAL, "data": {"train": "t", "columns": {"prompt": "a"}}}
    chosen = [
        "train.lr=1e-4",
        "method.target_modules=[q_proj, v_proj]",
        "data.columns.prompt=b",
        "train.clip=null",
        "model=n",
    ]
    recipe = load_recipe(document, chosen)
    assert recipe.train.lr == 1e-4
    assert recipe.method.target_modules == ["q_proj", "v_proj"]
    assert recipe.data.columns.prompt == "b"
    assert recipe.train.clip is None
    assert recipe.model == "n"
    assert document["data"]["columns"] == {"prompt": "a"}  # the caller's own is not written to
    assert load_recipe(recipe, ["train.seed=3"]).train.seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train.lr=[1", "no YAML"),
        ("model.name=x", "'model' has no keys below it"),
        ("train.epoch=1", r"train\.epoch: unknown key; did you mean 'epochs'"),
        ("trian.lr=1", "trian: unknown key; did you mean 'train'"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(MINIMAL, [override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean 'train'"),
        ({"train": {"learning_rate": 1}}, r"train\.learning_rate: unknown key"),
        ({"train": {"batch_size": 8.5}}, r"train\.batch_size: expected a whole number, got 8\.5"),
        ({"train": {"lr": "fast"}}, r"train\.lr: expected a number or nothing, got 'fast'"),
        ({"train": {"lr": -1}}, r"- train\.lr must be a finite number above 0, not -1"),
        ({"train": [1]}, r"train: expected keys below it, got \[1\]"),
        ({"train": None}, "train: expected keys below it, got nothing: leave it out"),
        ({"data": "train.jsonl"}, "data: expected keys below it, got 'train.jsonl'"),
        ({"model": 3}, "model: expected text, got 3"),
        (
            {"task": "causal"},
            "task: expected one of causal-lm, seq2seq, sequence-classification, image-classification, .*got 'causal'",
        ),
        ({"method": {"name": "lroa"}}, "method: expected keys with `name: lora .*, got 'lroa'.*did you mean 'lora'"),
        ({"method": "lora"}, "method: expected keys with"),
        ({"method": {"r": 0}}, r"method: .*\br\b.*0"),
        ({"method": {"rank": 8}}, r"method\.rank: unknown key"),
        ({"generate": {"temperature": 0.5}}, "generate: temperature acts only with do_sample"),
    ],
)
def test_faults(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({**MINIMAL, **changes})


def test_every_fault_is_listed_at_once():
    wrong = {"data": {"trian": "x"}, "task": "sql", "train": {"lr": "x", "epochs": "y"}, "method": {"r": -1}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(wrong)
    message = str(caught.value)
    assert message.startswith("the recipe has 6 faults:")
    for part in ("data.trian", "task", "train.lr", "train.epochs", "method", "model: missing"):
        assert f"  - {part}" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys such as `model:` and `data:`, got nothing"),
        ("- a\n", "got list"),
        ("model: [a\n", "is no YAML"),
        ("model: a\ndata: {train: x}\ntrain: {lr: 1}\ntrain: {epochs: 2}\n", r"'train' stands twice \(line 4\)"),
        ("model: !!python/object/apply:os.system [ls]\n", "is no YAML"),
        ("model: \x00\n", "is no YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_no_file_a_folder_and_bytes(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"Did you mean .*recipe\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "recipe.yaml")


def test_yaml_goes_through_unchanged():
    text = "a: &x {b: [1, 2.5, yes, null, 'x']}\nc: *x\nd: {e: {f: [{g: 1}, {g: 2}]}}\n"
    assert read_yaml(text, "it") == yaml.safe_load(text)
