"""The section `compare`: what it means, and every mistake in it told before anything loads."""

import math

import pytest
from compare_kit import QUERY

from lorakit.compare.arms import arms_of
from lorakit.compare.defaults import SWEEPS, rates_around
from lorakit.compare.plan import load_plan
from lorakit.compare.search import at_edge, best_rate, next_rate
from lorakit.errors import RecipeError
from lorakit.methods.table import METHODS


def test_entries_become_arms():
    entries = [
        "full",
        {"name": "lora", "r": 4, "lr": 1e-3},
        {"name": "lora", "label": "LoRA", "sizes": {"r": [1, 8], "alpha": [2, 16]}, "lrs": [3e-3, 1e-3]},
        {"label": "both", "combine": ["lora", {"name": "prefix-tuning"}], "sizes": {"lora.r": [2]}},
    ]
    full, fixed, small, large, both = arms_of(entries)
    assert (full.label, full.document, full.size, full.swept) == ("full", {"name": "full"}, None, None)
    assert full.rates == rates_around(["full"])
    assert (fixed.document, fixed.rates) == ({"name": "lora", "r": 4}, (1e-3,))
    assert (small.label, large.label, small.family) == ("LoRA r=1", "LoRA r=8", "LoRA")
    assert small.document == {"name": "lora", "r": 1, "alpha": 2}
    assert (large.swept, large.rates) == (("r", 8.0), (1e-3, 3e-3))
    assert both.document == [{"name": "lora", "r": 2}, {"name": "prefix-tuning"}]
    assert both.label == "both"


def test_a_size_is_told_by_as_few_fields_as_it_takes():
    arms = arms_of([{"name": "lora", "sizes": {"r": [8, 8], "alpha": [8, 16]}}])
    assert [arm.label for arm in arms] == ["lora r=8, alpha=8", "lora r=8, alpha=16"]


def test_sweep_names_fields_that_the_methods_have():
    assert set(SWEEPS) <= set(METHODS)
    for name, sizes in SWEEPS.items():
        for arm in arms_of([{"name": name, "sizes": "sweep"}]):
            METHODS[name](**{key: value for key, value in arm.document.items() if key != "name"})
        assert len(arms_of([{"name": name, "sizes": "sweep"}])) == len(next(iter(sizes.values())))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"r": 4}], "either `name` or `combine`"),
        ([4], "either `name` or `combine`"),
        ([{"name": "lora", "sizes": {"r": 4}}], r"sizes: expected fields with lists"),
        ([{"name": "lora", "sizes": {"r": [1, 2], "alpha": [1]}}], "lists of one length"),
        ([{"name": "full", "sizes": "sweep"}], "no sweep of full"),
        ([{"name": "lora", "lr": "fast"}], "expected numbers above 0"),
        ([{"name": "lora", "lrs": []}], "expected numbers above 0"),
        ([{"name": "lora", "lr": 1e-3, "lrs": [1e-3]}], "leave one out"),
        (["lora", {"name": "lora", "label": "Lora"}], "'lora'"),
        (["lora", "lora"], "give each a `label`"),
        ([{"combine": ["lora"]}], "at least two methods"),
        ([{"combine": ["lora", "full"], "r": 2}], "stand with its methods"),
        ([{"combine": ["lora", "full"], "sizes": {"r": [2]}}], "METHOD.FIELD"),
    ],
)
def test_mistakes_in_the_methods(entries, message):
    with pytest.raises(RecipeError, match=message):
        arms_of(entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"section": {"seed": [0]}}, "compare.seed: unknown key; did you mean 'seeds'"),
        ({"section": {"seeds": []}}, "at least one"),
        ({"section": {"seeds": [1, 1]}}, "different seeds"),
        ({"section": {"middle": "mode"}}, "mean, median"),
        ({"section": {"search": {"budget": 0}}}, "budget must be at least 1"),
        ({"section": {"search": {"holdout": 1.0}}}, "share in"),
        ({"section": {"latency": {"length": 0}}}, "of at least 1"),
        ({"section": {"quality": "bleu"}}, "compares texts, not labels"),
        ({"section": {"few_shot": [2]}}, "belongs to causal-lm"),
        ({"section": {"general": {"text": "a.txt"}}}, "read by causal-lm"),
        ({"method": {"name": "lora"}}, "Leave `method` out"),
        ({"train": {"save_every": 3}}, "keep no checkpoints"),
        ({"train": {"epoch": 3}}, "did you mean 'epochs'"),
        (
            {"methods": [{"name": "lora", "rank": 4}, {"name": "lorra"}]},
            "(?s)lora: method.rank: unknown.*lorra: method",
        ),
        ({"methods": []}, "compare.methods is empty"),
        ({"data": {"eval": None}}, "data.eval is missing"),
    ],
)
def test_mistakes_in_the_recipe(recipe, changes, message):
    methods = changes.pop("methods", [QUERY])
    with pytest.raises(RecipeError, match=message):
        load_plan(recipe("sequence-classification", methods, **changes))


def test_no_section_is_told(recipe):
    document = recipe("sequence-classification", [QUERY])
    del document["compare"]
    with pytest.raises(RecipeError, match="no section `compare`"):
        load_plan(document)


def test_overrides_reach_both_parts(recipe):
    plan = load_plan(recipe("sequence-classification", [QUERY]), ["compare.seeds=[4, 5]", "train.epochs=3"])
    assert (plan.config.seeds, plan.recipe.train.epochs) == ((4, 5), 3)


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def walk(gives, budget):
    tried = {}
    while (rate := next_rate(GRID, tried, budget)) is not None:
        tried[rate] = gives(rate)
    return tried


@pytest.mark.parametrize("peak", GRID)
def test_the_search_finds_the_top_of_a_hill(peak):
    tried = walk(lambda rate: -abs(math.log(rate / peak)), budget=5)
    assert best_rate(tried) == peak
    assert at_edge(GRID, tried) == (peak in (GRID[0], GRID[-1]))


def test_the_search_keeps_its_budget_and_tells_where_it_stopped():
    tried = walk(lambda rate: rate, budget=2)
    assert list(tried) == [1e-3, 3e-3]
    assert at_edge(GRID, tried)
    assert walk(lambda rate: 0.5, budget=9) == dict.fromkeys((1e-3, 3e-3, 3e-4, 1e-4), 0.5)


def test_a_rate_that_fails_is_too_high():
    tried = walk(lambda rate: None if rate > 2e-4 else 1.0, budget=5)
    assert list(tried) == [1e-3, 3e-4, 1e-4]
    assert best_rate(tried) == 1e-4
    assert best_rate({1e-3: None}) is None
