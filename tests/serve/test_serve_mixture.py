"""Whatever runs beside it, a request gets the greedy tokens of its own adapter alone: random schedules on two bases."""

import random
import time
from pathlib import Path

import pytest
from serve_kit import BASES, Alone, saved, tokenizer

from lorakit.errors import QueueFullError
from lorakit.serve.bank import Bank, Version
from lorakit.serve.engine import Engine
from lorakit.serve.handle import Handle
from lorakit.serve.limits import Limits, SamplingParams

LIMITS = Limits(page_tokens=8, cache_tokens=768, step_tokens=40, running=6, prompt_tokens=100, queue=64)
METHODS = (
    {"r": 4}, {"r": 8, "use_rslora": True}, {"r": 3, "use_dora": True}, {"r": 16, "target_modules": "all-linear"},
    {"r": 5, "lora_bias": True}, {"r": 2}, {"r": 1}, {"r": 6, "rank_pattern": {"down_proj": 2, "c_fc": 2}},
)  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def shelf(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Path], Alone]:
    kind = request.param
    tmp = tmp_path_factory.mktemp(kind)
    folders = {f"{n}": saved(kind, tmp / f"{n}", seed=n, **fields) for n, fields in enumerate(METHODS)}
    return kind, folders, Alone(kind, folders)


def schedule(shelf: tuple[str, dict[str, Path], Alone], seed: int, *, strict: bool) -> None:
    """One random schedule: prompts with common prefixes longer than a page, arrivals in bursts, cancellations, and a name
    whose version changes half-way. Memory for few adapters, so that some are read again from disk."""
    kind, folders, alone = shelf
    rng = random.Random(seed)
    prefixes = [[rng.randrange(3, 250) for _ in range(rng.randrange(9, 30))] for _ in range(2)]
    with Bank(BASES[kind](), memory=120_000, device_ranks=rng.choice((24, 64, 1024))) as bank:
        names = rng.sample(sorted(folders), 5)
        versions: dict[str, Version] = {name: bank.load(folders[name], name) for name in names}
        with Engine(bank.model, tokenizer(), bank, LIMITS, strict=strict) as engine:
            asked: list[tuple[list[int], str | None, int, Handle]] = []
            for number in range(rng.randrange(8, 20)):
                if number == 7:  # the name of one adapter now stands for another's content
                    bank.unload(versions[names[0]])
                    versions[names[0]] = bank.load(folders[names[1]], names[0])
                name = rng.choice([*names, None])
                tail = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 30))]
                prompt, new = rng.choice(prefixes) + tail, rng.randrange(1, 12)
                version = None if name is None else versions[name]
                if rng.random() < 0.1:  # goes to model.generate, in turns with the continuous batch
                    params = SamplingParams(max_new_tokens=new, allowed=lambda _: list(range(258)))
                else:
                    params = SamplingParams(max_new_tokens=new)
                handle = engine.generate(prompt, version, params)
                content = names[1] if number >= 7 and name == names[0] else name
                asked.append((prompt, content, new, handle))
                if rng.random() < 0.15:
                    rng.choice(asked)[3].cancel()
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 0.01)
            for prompt, content, new, handle in asked:
                answer = handle.result(60)
                full = new if answer.finish != "cancelled" else len(answer.tokens)
                alone.check(prompt, content, answer.tokens, full, {2})
        assert not engine.works
        assert all(one.users == 0 for one in bank.resident())


@pytest.mark.parametrize("seed", range(6))
def test_a_request_gets_its_own_adapters_tokens(shelf: tuple[str, dict[str, Path], Alone], seed: int) -> None:
    schedule(shelf, seed, strict=seed % 3 == 0)


@pytest.mark.long
def test_two_hundred_schedules(shelf: tuple[str, dict[str, Path], Alone]) -> None:
    for seed in range(1000, 1100):  # of each base
        schedule(shelf, seed, strict=seed % 3 == 0)
    assert shelf[2].ties <= 20


def test_a_full_queue_is_refused(shelf: tuple[str, dict[str, Path], Alone]) -> None:
    kind, _, _ = shelf
    limits = Limits(page_tokens=8, cache_tokens=768, step_tokens=40, running=2, queue=3)
    with Bank(BASES[kind]()) as bank, Engine(bank.model, tokenizer(), bank, limits) as engine:
        params = SamplingParams(max_new_tokens=100, ignore_eos=True)
        handles = [engine.generate([5, 6, 7], None, params) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 requests"):
            engine.generate([5, 6, 7], None, params)
        assert all(handle.result(60).finish in ("length", "stop") for handle in handles)
