"""One request's fault is that request's alone: texts without bytes, tiny temperatures, weights that overflow, constraints that
raise, searches that are cut off, a batch that dies, loads beside a merge."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serve_app_kit as app_kit
import torch
from serve_kit import BASES, Alone, saved, tokenizer
from test_serve_classify import TEXTS, base

import lorakit as lk
from lorakit.errors import ServeError, TooLongError, UsageError
from lorakit.serve.bank import Bank
from lorakit.serve.engine import Engine
from lorakit.serve.handle import Generated, Handle
from lorakit.serve.heads import head_path
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.paged import Apart, salted
from lorakit.serve.sample import drawn

LIMITS = Limits(page_tokens=8, cache_tokens=1024, step_tokens=40, running=6, prompt_tokens=100)
PROMPT = [40, 41, 42, 43]
OTHERS = [[50, 51, 52], [60] * 20, [70, 71]]


def free(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"ignore_eos": True, "max_new_tokens": 12} | fields))


def exploded(folder: Path, by: Callable[[str, torch.Tensor], float], **fields: Any) -> Path:
    """An adapter whose file has finite values that are far too large. by: a tensor's name and itself -> its factor."""
    plain = BASES["llama"]()
    lk.attach(plain, lk.LoRA(r=4, alpha=8, **({"target_modules": "all-linear"} | fields)), name="a", seed=3)
    for name, parameter in plain.named_parameters():
        if "lora" in name:
            parameter.data.fill_(1.0).mul_(by(name, parameter))
    return lk.save(plain, folder, name="a")


def large_b(value: float) -> Callable[[str, torch.Tensor], float]:
    return lambda name, _: value if "lora_B" in name else 0.1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("faults")
    return {
        "a": saved("llama", tmp / "a"),
        "big": exploded(tmp / "big", large_b(1e38)),
        "keys": exploded(tmp / "keys", large_b(1e38), target_modules=["k_proj"]),
    }


@pytest.fixture
def served(made: dict[str, Path]) -> Iterator[Any]:
    """(engine, versions)"""
    with Bank(BASES["llama"]()) as bank:
        versions = {name: bank.load(folder, name) for name, folder in made.items()}
        with Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
            yield engine, versions
            app_kit.until(lambda: not engine.works)
        assert all(one.users == 0 for one in bank.resident())


def test_a_stop_text_without_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="surrogate"):
        SamplingParams(stop=("fine", "\ud800"))


@pytest.mark.parametrize("new", [1, 30])
def test_a_fault_in_what_is_made_of_tokens_ends_that_request_alone(served: Any, new: int) -> None:
    engine, versions = served
    bad_stop = free(max_new_tokens=new, stop=("@",))
    object.__setattr__(bad_stop, "stop", ("\ud800",))  # past what is checked
    with engine._turns:  # so that all come into one step
        bad = engine.generate(PROMPT, versions["a"], bad_stop)
        others = [engine.generate(prompt, versions["a"], free()) for prompt in OTHERS]
    with pytest.raises(ServeError, match="UnicodeEncodeError"):
        bad.result(20)
    assert [len(one.result(20).tokens) for one in others] == [12, 12, 12]
    assert engine.alive


def test_a_listener_that_raises_harms_no_one() -> None:
    handle, heard = Handle(1, None, lambda _: None), []

    def broken() -> None:
        heard.append(handle.tokens)
        raise RuntimeError("Event loop is closed")

    handle.on_news(broken)
    handle.push([1])
    handle.push([2])
    handle.finish(handle.tokens, "", "length")
    assert heard == [(1,)]
    assert handle.result(0).tokens == (1, 2)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
def test_a_tiny_temperature_is_greedy(served: Any, temperature: float) -> None:
    engine, versions = served
    greedy = engine.generate(PROMPT, versions["a"], free()).result(20).tokens
    for more in ({}, {"repetition_penalty": 1.0001}, {"top_p": 0.5, "top_k": 3}):
        asked = free(temperature=temperature, seed=1, **more)
        if "repetition_penalty" not in more:
            assert engine.generate(PROMPT, versions["a"], asked).result(20).tokens == greedy
        else:
            assert len(engine.generate(PROMPT, versions["a"], asked).result(20).tokens) == 12
    row = torch.tensor([-torch.inf, 3.0e38, -3.0e38, 1.0])
    assert drawn(row, SamplingParams(temperature=temperature), torch.Generator()) == 1


@pytest.mark.parametrize("name", ["big", "keys"])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "seed": 1}], ids=["greedy", "sampled"])
def test_weights_that_overflow_end_their_own_requests_alone(
    served: Any, made: dict[str, Path], name: str, fields: dict[str, Any]
) -> None:
    engine, versions = served
    alone = Alone("llama", {"a": made["a"]})
    reference = engine.generate(OTHERS[0], versions["a"], free(temperature=1.0, seed=5)).result(20).tokens
    with engine._turns:
        early = [engine.generate(prompt, versions["a"], free(max_new_tokens=30)) for prompt in OTHERS]
        plain = engine.generate(PROMPT, None, free(max_new_tokens=30))
        seeded = engine.generate(OTHERS[0], versions["a"], free(temperature=1.0, seed=5))
        bad = [engine.generate(prompt, versions[name], free(**fields)) for prompt in (PROMPT, [80] * 90)]
    for handle in bad:
        with pytest.raises(ServeError, match="expected finite logits"):
            handle.result(20)
        assert handle.tokens == ()
    for prompt, handle in zip(OTHERS, early, strict=True):
        alone.check(prompt, "a", handle.result(20).tokens, 30, set())
    alone.check(PROMPT, None, plain.result(20).tokens, 30, set())
    assert seeded.result(20).tokens == reference  # and no random number was drawn twice
    assert engine.alive


@pytest.mark.parametrize("fields", [{"num_beams": 2}, {"repetition_penalty": 1.5}, {"allowed": lambda _: [50, 60, 70]}])
def test_weights_that_overflow_end_their_own_search_alone(served: Any, fields: dict[str, Any]) -> None:
    engine, versions = served
    params = [free(**fields)] * 2 if "num_beams" in fields else [free(**fields), free(temperature=0.7, **fields)]
    expected = engine.generate(OTHERS[0], versions["a"], params[0]).result(20).tokens
    with engine._turns:  # the thread of searches takes them together
        first = engine.generate(PROMPT, None, params[0])
        app_kit.until(lambda: engine._search._queue.empty())
        bad = [engine.generate(PROMPT, versions["big"], one) for one in params]
        other = engine.generate(OTHERS[0], versions["a"], params[0])
    for handle in bad:
        with pytest.raises(ServeError, match="expected finite logits"):
            handle.result(20)
    assert other.result(20).tokens == expected
    assert len(first.result(20).tokens) == 12


def test_a_fault_in_a_constraint_ends_no_strangers_search(served: Any) -> None:
    engine, versions = served

    def broken(tokens: list[int]) -> list[int]:
        raise ValueError("no such state")

    with engine._turns:
        first = engine.generate(PROMPT, None, free(allowed=lambda _: [9]))
        app_kit.until(lambda: engine._search._queue.empty())
        bad = [
            engine.generate(PROMPT, versions["a"], free(allowed=broken)),
            engine.generate(PROMPT, versions["a"], free(allowed=lambda _: [10**6])),
            engine.generate(PROMPT, versions["a"], free(allowed=lambda _: [], temperature=1.0)),
        ]
        surrogate = free(allowed=lambda _: [7], stop=("@",))
        object.__setattr__(surrogate, "stop", ("\ud800",))  # past what is checked
        bad.append(engine.generate(PROMPT, versions["a"], surrogate))
        good = engine.generate(PROMPT, versions["a"], free(allowed=lambda _: [7]))
        short = engine.generate(
            PROMPT, versions["a"], free(allowed=lambda tokens: [[7], [8]][len(tokens)], stop=("$",))
        )
    for handle in bad:
        with pytest.raises(ServeError):
            handle.result(20)
    assert good.result(20).tokens == (7,) * 12
    assert (short.result(20).tokens, short.result(0).finish) == ((7, 8), "stop")  # "#$", and no word after it
    assert first.result(20).tokens == (9,) * 12


def test_values_that_would_reach_other_rows_are_refused(tmp_path: Path) -> None:
    half = BASES["llama"]().half()
    with Bank(BASES["llama"]()) as bank, pytest.raises(UsageError, match=r"q_proj: values above 1e\+15 in A"):
        bank.load(exploded(tmp_path / "a", lambda name, _: 1e38 if "lora_A" in name else 0.1), "a")
    with Bank(half) as bank, pytest.raises(UsageError, match=r"not finite in torch\.float16"):
        bank.load(exploded(tmp_path / "b", large_b(1e5)), "b", check_base=False)


def test_texts_whose_numbers_overflow_fail_alone(tmp_path: Path) -> None:
    folder = saved("bert", tmp_path / "a", 0, 0.3, lambda: base("bert"), modules_to_save=["classifier"])
    with Bank(base("bert")) as bank, Engine(bank.model, tokenizer(), bank) as engine:
        version = bank.load(folder, "a")
        bank.rows(version).head["weight"].fill_(3e38)
        results: dict[Any, Any] = {}

        def ask(owner: Any) -> None:
            try:
                results[owner] = engine.classify(TEXTS, owner)
            except ServeError as error:
                results[owner] = error

        threads = [threading.Thread(target=ask, args=(owner,)) for owner in (version, None)]
        with engine._rows._changed:
            for thread in threads:
                thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(20)
        assert "not finite" in str(results[version])
        assert len(results[None]) == len(TEXTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keys_and_values_of_one_request_do_not_reach_another(dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        apart, key, value = Apart(), torch.ones(1, 2, 7, 4, dtype=dtype), torch.ones(1, 2, 7, 4, dtype=dtype)
        key[0, 1, 0, 3], value[0, 0, 5, 0] = bad, bad
        both = apart.clean(key, value, [0, 2, 5, 7])
        assert apart.lost == {0, 2}
        for one in both:
            assert one.isfinite().all()
            assert torch.equal(one[0, :, :, 0].sum(0), torch.tensor([0, 2, 2, 2, 2, 0, 2], dtype=dtype))


def test_a_batch_that_dies_leaves_no_request_behind(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, versions = served
    batch = engine._batch
    deliver = batch.output_router.deliver_batch

    def lost(outputs: list[Any]) -> None:
        if any(one.is_finished() for one in outputs):
            raise RuntimeError("lost")  # with the outputs of those that have just ended
        deliver(outputs)

    monkeypatch.setattr(batch.output_router, "deliver_batch", lost)
    searched = engine.generate(PROMPT, versions["a"], free(max_new_tokens=60, num_beams=2))
    with engine._turns:
        handles = [engine.generate(PROMPT, versions["a"], free(max_new_tokens=new)) for new in (1, 30, 1)]
    for handle in handles:
        with pytest.raises(ServeError, match="lost"):
            handle.result(20)
    assert not engine.alive
    assert len(searched.result(20).tokens) == 60  # it runs elsewhere
    app_kit.until(lambda: all(one.users == 0 for one in engine.bank.resident()))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("roberta", {"target_modules": ["query", "dense"]}),
        ("llama", {"target_modules": ["q_proj", "score"]}),
        ("bert", {"target_modules": ["query", "classifier"]}),
    ],
)
def test_pairs_in_a_head_are_refused(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "a", 1, 0.3, lambda: base(kind), r=2, **fields)
    cured = saved(
        kind, tmp_path / "b", 1, 0.3, lambda: base(kind), r=2, modules_to_save=[head_path(base(kind))], **fields
    )
    with Bank(base(kind)) as bank:
        with pytest.raises(UsageError, match=r"low-rank pair in the classifier's head.*modules_to_save"):
            bank.load(folder, "a")
        assert bank.load(cured, "b").labels


def test_beams_are_bounded_by_the_cache(served: Any) -> None:
    engine, versions = served
    with pytest.raises(TooLongError, match=r"811 tokens together.*9 times 4 \+ 100"):
        engine.generate(PROMPT, None, free(num_beams=9, max_new_tokens=100))
    seen: list[int] = []
    padded = engine._search._padded
    engine._search._padded = lambda works: (seen.append(len(works)), padded(works))[1]
    params = free(num_beams=5, max_new_tokens=60)
    with engine._turns:
        first = engine.generate(PROMPT, versions["a"], free())
        asked = [engine.generate(PROMPT, versions["a"], params) for _ in range(5)]
        asked.append(engine.generate([60] * 90, versions["a"], free(num_beams=5, max_new_tokens=30)))
    for handle in (first, *asked):
        handle.result(60)
    assert sum(seen) == 6
    assert max(seen) == 3  # 3 * 5 * 64 <= 1024 < 4 * 5 * 64


def test_closing_under_a_search_fails_it(made: dict[str, Path]) -> None:
    with Bank(BASES["llama"]()) as bank:
        version = bank.load(made["a"], "a")
        for fields in ({"num_beams": 4}, {"repetition_penalty": 1.1}):
            engine = Engine(bank.model, tokenizer(), bank, LIMITS)
            calls = 0

            def close(tokens: list[int], engine: Engine = engine) -> list[int]:
                nonlocal calls
                calls += 1
                engine._search._closing = calls > 20
                return list(range(3, 250))

            handle = engine.generate(PROMPT, version, free(max_new_tokens=90, allowed=close, **fields))
            with pytest.raises(ServeError, match="stopped before"):
                handle.result(20)
            engine.close()
            assert bank.resident()[0].users == 0


def test_an_answer_that_had_ended_is_given_when_the_engine_closes(made: dict[str, Path]) -> None:
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
        version = bank.load(made["a"], "a")

        def close(tokens: list[int]) -> list[int]:
            engine._search._closing = len(tokens) == 20
            return [7]

        params = SamplingParams(max_new_tokens=90, allowed=lambda tokens: [[9], [2]][len(tokens)])
        with engine._turns:
            first = engine.generate(PROMPT, version, free(num_beams=2))
            app_kit.until(lambda: engine._search._queue.empty())
            both = [
                engine.generate(PROMPT, version, params),
                engine.generate(PROMPT, version, SamplingParams(max_new_tokens=90, allowed=close)),
            ]
        first.result(20)
        ended: Generated = both[0].result(20)
        assert (ended.tokens, ended.finish) == ((9,), "stop")
        with pytest.raises(ServeError, match="stopped before"):
            both[1].result(20)


def test_counting_while_requests_end(served: Any) -> None:
    engine, _ = served

    class Ending:
        @property
        def handle(self) -> Any:
            return engine.works.pop("one", None)

    engine.works |= {"one": Ending(), "two": Ending()}
    try:
        assert engine.stats().running == 2
    finally:
        engine.works.clear()


def test_a_load_beside_a_merge_sees_the_base_as_given(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dora = saved("llama", tmp_path / "dora", seed=4, use_dora=True)
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, LIMITS, merge_after=1) as engine:
        from lorakit.serve import take

        a, before, real = bank.load(made["a"], "a"), bank.load(dora, "d"), take.to_rows

        def merged_meanwhile(*given: Any) -> Any:
            engine._merging._together(a)
            return real(*given)

        monkeypatch.setattr(take, "to_rows", merged_meanwhile)
        beside = bank.load(dora, "d")
        assert engine._merging.merged == a.id
        for path, row in bank.rows(before).layers.items():
            assert torch.equal(row.gain, bank.rows(beside).layers[path].gain), path


def test_prefixes_of_versions_stay_apart_and_take_no_memory() -> None:
    tokens = [0, 5, (1 << 20) - 1, 7, 9, 9]
    numbers = [1, 2, 2047, 2048, 2049, 2048**2, 2048**3 + 5, 2048**4 - 1]
    read = [tuple(salted(number, tokens)) for number in (-1, *numbers)]
    assert len(set(read)) == len(read)
    assert read[0] == tuple(tokens)
    for one in read:
        assert array("i", one).tolist() == list(one)  # int32, as transformers hashes them
        assert [token % (1 << 20) for token in one] == tokens
        assert one[4:] == (9, 9)
    assert salted(1, [3]) != salted(2, [3])


def test_pages_are_shared_within_a_version_alone(served: Any) -> None:
    engine, versions = served
    (allocator,) = engine._batch.batch_processor.cache.cache_allocators.values()
    prompt, pages = [60 + k for k in range(40)], []
    for name in ("a", "a", None, None, "a"):
        engine.generate(prompt, versions.get(name or ""), free(max_new_tokens=1)).result(20)
        pages.append(len(allocator.ledger.hash_to_block))
    assert pages == [5, 5, 10, 10, 10]
