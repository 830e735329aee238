"""Single requests: streaming, stops, sampling, beams, constraints, cancellation, limits, faults. It also fails loudly where
transformers' continuous batching, which is no documented extension point, changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from serve_kit import BASES, Alone, saved, tokenizer

import lorakit as lk
from lorakit.errors import (
    FileError,
    ServeError,
    TimedOutError,
    TooLongError,
    UnknownAdapterError,
    UsageError,
    WrongKindError,
)
from lorakit.serve.bank import Bank
from lorakit.serve.engine import Engine
from lorakit.serve.limits import Limits, SamplingParams

LIMITS = Limits(page_tokens=8, cache_tokens=1024, step_tokens=40, running=6, prompt_tokens=100)
PROMPT = [40, 41, 42, 43]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("engine")
    return {name: saved("llama", tmp / name, seed=seed, r=2 + 3 * seed) for seed, name in enumerate("abc")}


@pytest.fixture
def served(folders: dict[str, Path]) -> Iterator[Any]:
    """(engine, versions)"""
    with Bank(BASES["llama"]()) as bank:
        versions = {name: bank.load(folder, name) for name, folder in folders.items()}
        with Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
            yield engine, versions
        assert not engine.works
        assert all(one.users == 0 for one in bank.resident())


def free(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"ignore_eos": True, "max_new_tokens": 12} | fields))


def test_tokens_stream_and_the_answer_names_its_adapter(served: Any) -> None:
    engine, versions = served
    handle = engine.generate(PROMPT, versions["a"], free())
    streamed = list(handle)
    answer = handle.result(30)
    assert answer.tokens == tuple(streamed)
    assert len(streamed) == 12
    assert (answer.finish, answer.prompt_tokens) == ("length", 4)
    assert answer.adapter == versions["a"].hash
    assert answer.text == tokenizer().decode(streamed)
    assert engine.generate(PROMPT, None, free()).result(30).adapter is None
    stats = engine.stats()
    assert (stats.finished, stats.new_tokens, stats.prompt_tokens) == (2, 24, 8)


def test_an_end_of_sequence_token_ends_and_is_left_out(served: Any) -> None:
    engine, versions = served
    full = engine.generate(PROMPT, versions["a"], free()).result(30).tokens
    engine._ends = frozenset({full[5]})
    first = full.index(full[5])
    answer = engine.generate(PROMPT, versions["a"], SamplingParams(max_new_tokens=12)).result(30)
    assert (answer.tokens, answer.finish) == (full[:first], "stop")


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_text_cuts_the_answer(served: Any, beams: int) -> None:
    engine, versions = served
    full = engine.generate(PROMPT, versions["a"], free(num_beams=beams)).result(60)
    stop = full.text[4:6]
    end = full.text.index(stop)
    answer = engine.generate(PROMPT, versions["a"], free(num_beams=beams, stop=("@@@", stop))).result(60)
    assert (answer.text, answer.finish) == (full.text[:end], "stop")
    assert answer.tokens == full.tokens[: end + len(stop)]


def test_a_seed_gives_the_same_whatever_runs_beside_it(served: Any) -> None:
    engine, versions = served
    params = free(temperature=1.5, top_p=0.95, top_k=50, seed=7)
    alone = engine.generate(PROMPT, versions["b"], params).result(30)
    beside = [engine.generate([50 + k] * (3 + k), versions["c"], free(temperature=1.0)) for k in range(4)]
    again = engine.generate(PROMPT, versions["b"], params)
    other = engine.generate(PROMPT, versions["b"], free(temperature=1.5, seed=8))
    assert again.result(30).tokens == alone.tokens
    assert other.result(30).tokens != alone.tokens
    assert all(len(handle.result(30).tokens) == 12 for handle in beside)
    greedy = engine.generate(PROMPT, versions["b"], free()).result(30).tokens
    assert engine.generate(PROMPT, versions["b"], free(temperature=1.0, top_k=1)).result(30).tokens == greedy


def test_beams_of_different_adapters_share_a_batch(served: Any, folders: dict[str, Path]) -> None:
    engine, versions = served
    prompts = {"a": PROMPT, "b": [60, 61], "c": [70, 71, 72, 73, 74, 75, 76], None: [80, 81, 82]}
    busy = [engine.generate([90 + k] * 5, versions["a"], free(max_new_tokens=40)) for k in range(3)]
    asked = {
        name: engine.generate(prompt, versions.get(name or ""), free(num_beams=3)) for name, prompt in prompts.items()
    }
    plain = BASES["llama"]()
    for name, folder in folders.items():
        lk.load(plain, folder, name=name)
    for name, handle in asked.items():
        with lk.use(plain, name), torch.no_grad():
            expected = plain.generate(
                torch.tensor([prompts[name]]), num_beams=3, max_new_tokens=12, do_sample=False, eos_token_id=None
            )
        assert handle.result(60).tokens == tuple(expected[0, len(prompts[name]) :].tolist()), name
    alone = Alone("llama", folders)
    for k, handle in enumerate(busy):
        alone.check([90 + k] * 5, "a", handle.result(60).tokens, 40, set())


def test_constrained_decoding_keeps_to_what_is_allowed(served: Any) -> None:
    engine, versions = served
    asked = [
        engine.generate(PROMPT, versions["a"], free(allowed=lambda tokens: [100 + len(tokens), 101 + len(tokens)])),
        engine.generate([60, 61], versions["b"], free(allowed=lambda tokens: [7] if tokens else [9], stop=("'" * 3,))),
    ]
    first, second = (handle.result(60) for handle in asked)
    assert all(token in (100 + k, 101 + k) for k, token in enumerate(first.tokens))
    assert second.tokens[0] == 9
    assert set(second.tokens[1:]) == {7}
    penalised = engine.generate(PROMPT, versions["a"], free(repetition_penalty=50.0)).result(60).tokens
    assert len(set(penalised)) == len(penalised)


def test_a_fault_in_a_constraint_ends_that_request_alone(served: Any) -> None:
    engine, versions = served

    def broken(tokens: list[int]) -> list[int]:
        raise ValueError("no such state")

    bad = engine.generate(PROMPT, versions["a"], free(allowed=broken))
    with pytest.raises(ServeError, match="no such state"):
        bad.result(60)
    assert len(engine.generate(PROMPT, versions["a"], free(num_beams=2)).result(60).tokens) == 12
    assert len(engine.generate(PROMPT, versions["a"], free()).result(60).tokens) == 12


@pytest.mark.parametrize("beams", [1, 2])
def test_a_cancelled_request_frees_what_it_held(served: Any, beams: int) -> None:
    engine, versions = served
    handle = engine.generate(PROMPT, versions["a"], free(max_new_tokens=90, num_beams=beams))
    handle.cancel()
    assert handle.result(30).finish == "cancelled"
    handle.cancel()
    deadline = time.monotonic() + 30
    while engine.works and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.works
    assert engine.stats().cancelled == 1
    assert {one.users for one in engine.bank.resident()} == {0}


def test_what_is_asked_for_is_checked_first(served: Any) -> None:
    engine, versions = served
    with pytest.raises(UsageError, match="empty"):
        engine.generate([])
    with pytest.raises(UsageError, match="vocabulary of 258"):
        engine.generate([999])
    with pytest.raises(TooLongError, match="100 tokens of prompt"):
        engine.generate([5] * 101)
    with pytest.raises(TooLongError, match="128 tokens together"):
        engine.generate([5] * 100, None, SamplingParams(max_new_tokens=29))
    with pytest.raises(WrongKindError, match="for generation, and the request is for classification"):
        engine.classify(["a"])
    engine.bank.unload(versions["b"])
    with pytest.raises(UnknownAdapterError, match="'b'"):
        engine.generate(PROMPT, versions["b"], free())
    assert engine.works == {}
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(UsageError):
            SamplingParams(**wrong)
    with pytest.raises(UsageError):
        Limits(queue=0)


def test_a_request_that_takes_too_long_ends(folders: dict[str, Path]) -> None:
    limits = Limits(page_tokens=8, cache_tokens=1024, step_tokens=40, running=6, seconds=0.02)
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, limits) as engine:
        for beams in (1, 2):
            handle = engine.generate(PROMPT, None, free(max_new_tokens=100, num_beams=beams))
            with pytest.raises(TimedOutError, match=r"0\.02 seconds"):
                handle.result(30)


def test_a_version_that_cannot_be_read_again_fails_its_request_alone(tmp_path: Path) -> None:
    own = {name: saved("llama", tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    with Bank(BASES["llama"]()) as bank:
        size = bank.load(own["a"], "a").bytes
    with Bank(BASES["llama"](), memory=size) as bank, Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
        a, b = (bank.load(folder, name) for name, folder in own.items())
        (own["a"] / "adapter_model.safetensors").unlink()
        handle = engine.generate(PROMPT, a, free())
        with pytest.raises(FileError, match="not there"):
            handle.result(30)
        assert len(engine.generate(PROMPT, b, free()).result(30).tokens) == 12
        assert engine.stats().failed == 1


def test_a_closed_engine_says_so_and_the_running_fail(folders: dict[str, Path]) -> None:
    model = BASES["llama"]()
    model.train()
    with Bank(model) as bank:
        version = bank.load(folders["a"], "a")
        engine = Engine(model, tokenizer(), bank, LIMITS)
        assert engine.alive
        handle = engine.generate(PROMPT, version, free(max_new_tokens=90))
        searched = engine.generate(PROMPT, version, free(max_new_tokens=90, num_beams=2))
        engine.close()
        assert not engine.alive
        with pytest.raises(ServeError):
            handle.result(30)
        assert searched.done
        with pytest.raises(ServeError, match="closed"):
            engine.generate(PROMPT, version, free())
        assert {one.users for one in bank.resident()} == {0}
    assert model.training


def test_an_adapter_with_many_requests_does_not_hold_up_the_others(folders: dict[str, Path]) -> None:
    limits = Limits(page_tokens=8, cache_tokens=1024, step_tokens=40, running=2)
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, limits) as engine:
        a, b = bank.load(folders["a"], "a"), bank.load(folders["b"], "b")
        ended: list[str] = []
        crowd = [engine.generate([50 + k] * 4, a, free()) for k in range(20)]
        one = engine.generate(PROMPT, b, free())
        for handle in crowd:
            handle.when_done(lambda _: ended.append("a"))
        one.when_done(lambda _: ended.append("b"))
        for handle in (*crowd, one):
            handle.result(60)
        assert ended.index("b") < 10


def test_the_programs_random_numbers_go_on_as_if_nothing_had_been(folders: dict[str, Path]) -> None:
    with Bank(BASES["llama"]()) as bank:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
            version = bank.load(folders["a"], "a")
            engine.generate(PROMPT, version, free(temperature=1.0)).result(30)
            assert torch.equal(torch.rand(4), expected)


def test_one_adapter_alone_is_merged_and_the_base_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    model = BASES["llama"]()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    alone = Alone("llama", folders)
    with Bank(model) as bank:
        a, b = bank.load(folders["a"], "a"), bank.load(folders["b"], "b")
        with Engine(model, tokenizer(), bank, LIMITS, merge_after=3) as engine:
            for prompt, name, version in ((PROMPT, "a", a), ([50, 51], "a", a), (PROMPT, None, None), (PROMPT, "b", b)):
                answer = engine.generate(prompt, version, free()).result(30)
                alone.check(prompt, name, answer.tokens, 12, set())
            assert engine._merging.merges == 2
            dora = bank.load(saved("llama", tmp_path / "dora", use_dora=True), "d")  # its norms are the unmerged base's
            assert engine._merging.merged == b.id
            own = Alone("llama", {"d": tmp_path / "dora"})
            both = [(PROMPT, "b", b, alone), ([60] * 9, "d", dora, own), ([61] * 3, "a", a, alone)]
            asked = [(*one, engine.generate(one[0], one[2], free())) for one in both]
            beams = engine.generate(PROMPT, b, free(num_beams=2))
            for prompt, name, _, reference, handle in asked:
                reference.check(prompt, name, handle.result(30).tokens, 12, set())
            assert len(beams.result(30).tokens) == 12
            engine.generate(PROMPT, a, free()).result(30)
            assert engine._merging.merged == a.id
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_places_of_ended_requests_are_free_for_those_on_the_other_path(tmp_path: Path) -> None:
    own = [saved("llama", tmp_path / str(k), seed=k, r=6) for k in range(2)]
    with Bank(BASES["llama"](), device_ranks=8) as bank, Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
        a, b = (bank.load(folder, "x") for folder in own)
        for first, second in ((1, 2), (2, 1), (1, 1), (2, 2)):
            one = engine.generate(PROMPT, a, free(num_beams=first))
            other = engine.generate(PROMPT, b, free(num_beams=second))
            assert len(one.result(30).tokens) == len(other.result(30).tokens) == 12


def test_what_cannot_be_served_is_named() -> None:
    with Bank(tiny.t5()) as bank, pytest.raises(WrongKindError, match="encoder-decoder"):
        Engine(bank.model, tokenizer(), bank)
    with Bank(BASES["llama"]()) as bank, pytest.raises(UsageError, match="another model"):
        Engine(BASES["llama"](), tokenizer(), bank)
