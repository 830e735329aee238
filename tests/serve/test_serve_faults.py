"""What a sceptical operator and an attacker found: names of labels, expressions that never end, holds that were not given
back, threads that died in silence, versions that do not load."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import runs
import serve_app_kit as app_kit
import tiny
from serve_kit import BASES, saved, tokenizer

import lorakit as lk
from lorakit.errors import FileError, ServeError
from lorakit.serve.bank import Bank
from lorakit.serve.classify import RowsThread
from lorakit.serve.engine import Engine
from lorakit.serve.follow import TextStream, new_tokens
from lorakit.serve.handle import Handle
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.listen import ListenConfig, uvicorn_settings
from lorakit.serve.registry import Registry
from lorakit.serve.server import Server, ServerConfig
from lorakit.serve.work import Work, conclude

LIMITS = Limits(page_tokens=8, cache_tokens=1024, step_tokens=40, running=6, prompt_tokens=100)
PROMPT = [40, 41, 42, 43]


def free(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"ignore_eos": True, "max_new_tokens": 12} | fields))


def users(bank: Bank) -> list[int]:
    return [one.users for one in bank.resident()]


def test_a_runs_own_adapter_names_its_labels(tmp_path: Path) -> None:
    model = runs.save_model(tmp_path / "model", tiny.roberta)
    recipe = {
        "model": model,
        "task": "sequence-classification",
        "data": {"train": runs.write_rows(tmp_path / "train.jsonl", runs.label_rows(12))},
        "method": {"target_modules": ["query"]},
        "train": {"batch_size": 8, "epochs": 1},
        "output": str(tmp_path / "registry" / "mood"),
    }
    lk.train(recipe)
    with Server(
        model, tmp_path / "registry", ServerConfig(task="sequence-classification", num_labels=3, warm=False)
    ) as server:
        (answer,) = server.classify(["red so so"], "mood")
        assert set(answer.scores) == {"neg", "pos", "so"}
        assert sum(answer.scores.values()) == pytest.approx(1)


def test_the_same_text_whole_streamed_and_by_generate() -> None:
    tok = tokenizer()
    tok.clean_up_tokenization_spaces = True  # a tokenizer whose own wish is "a ." -> "a."
    tok.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = tok("it is so . really ?", add_special_tokens=False)["input_ids"]
    handle = Handle(1, None, lambda _: None)
    handle.push(ids)
    conclude(Work("x", [1], None, SamplingParams(), handle, 0.0, frozenset()), "length", tok)
    text = handle.result(0).text
    stream = TextStream(tok, ())
    assert text == "it is so . really ?"
    assert "".join([*(stream.push([one]) for one in ids), stream.finish(text)]) == text


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_an_expression_that_never_ends_is_refused_at_once(key: str, tmp_path: Path) -> None:
    folder, evil = saved("llama", tmp_path / "a"), r"(([a-z0-9_.])+)+[A-Z]"
    config = json.loads((folder / "adapter_config.json").read_text())
    value = {evil: 4} if key == "rank_pattern" else evil
    more = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value} | more))
    with Bank(BASES["llama"]()) as bank, pytest.raises(FileError, match="takes more than 2 seconds"):
        bank.load(folder, "a")
    if key == "rank_pattern":  # which the reading itself matches
        with pytest.raises(FileError, match="takes more than 2 seconds"):
            Registry(tmp_path / "registry").publish("a", folder)


def test_expressions_that_end_are_served_and_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [saved("llama", tmp_path / str(k), k, target_modules=r".*\.(q_proj|v_proj)") for k in range(2)]
    with Bank(BASES["llama"]()) as bank:
        bank.load(folders[0], "a")
        monkeypatch.setattr("lorakit.serve.patterns._ends", lambda *_: False)
        bank.load(folders[1], "b")  # the same expression is not tried again
        with pytest.raises(FileError, match="by their names"):
            bank.load(saved("llama", tmp_path / "c", target_modules=r".*\.(k_proj|v_proj)"), "c")


def test_more_names_than_a_model_has_are_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"layer{k}": 4 for k in range(5000)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with Bank(BASES["llama"]()) as bank, pytest.raises(FileError, match="rank_pattern has more than the"):
        bank.load(folder, "a")


def test_a_request_that_cannot_be_handed_on_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path / "a")
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
        version = bank.load(folder, "a")

        def full(_: Any) -> None:
            raise RuntimeError("full")

        monkeypatch.setattr(engine._batch, "submit", full)
        with pytest.raises(RuntimeError, match="full"):
            engine.generate(PROMPT, version, free())
        assert users(bank) == [0]
        with bank._lock:
            bank._let_go(bank._entries[version.id])  # now it is read in the loader's thread first
        with pytest.raises(ServeError, match="full"):
            engine.generate(PROMPT, version, free()).result(20)
        assert users(bank) == [0]
        assert not engine.works


def test_closing_does_not_wait_for_room(tmp_path: Path) -> None:
    folders = [saved("llama", tmp_path / str(k), k) for k in range(2)]
    with Bank(BASES["llama"]()) as sizes:
        size = sizes.load(folders[0], "a").bytes
    with Bank(BASES["llama"](), memory=size + 10) as bank:
        engine = Engine(bank.model, tokenizer(), bank, Limits(page_tokens=8, cache_tokens=1024, running=6))
        a = bank.load(folders[0], "a")
        b = bank.load(folders[1], "b")  # takes a's place
        first = engine.generate(PROMPT, b, free(max_new_tokens=100))
        next(iter(first))
        second = engine.generate(PROMPT, a, free())  # waits for b's request to end
        engine.close()
        for handle in (first, second):
            with pytest.raises(ServeError, match=r"stopped|closed|finished"):
                handle.result(0)
        assert users(bank) == [0, 0]


def test_cancelled_before_the_batch_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
        submit = engine._batch.submit

        def late(work: Work) -> None:
            work.handle.cancel()
            app_kit.until(engine._batch.cancel_queue.empty)  # the batch has looked, and found nothing to cancel
            submit(work)

        monkeypatch.setattr(engine._batch, "submit", late)
        before = engine._batch.steps
        handle = engine.generate(PROMPT, None, free(max_new_tokens=100))
        assert handle.result(20).finish == "cancelled"
        app_kit.until(lambda: not engine.works)
        assert engine._batch.steps - before < 50


@pytest.mark.parametrize("beams", [1, 2])
def test_a_fault_in_placing_ends_its_requests_and_not_the_thread_of_searches(
    beams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bank(BASES["llama"]()) as bank, Engine(bank.model, tokenizer(), bank, LIMITS) as engine:
        version = bank.load(saved("llama", tmp_path / "a"), "a")
        with monkeypatch.context() as patch:
            patch.setattr(bank, "place", _out_of_memory)
            with pytest.raises(ServeError):
                engine.generate(PROMPT, version, free(num_beams=beams)).result(20)
            app_kit.until(lambda: users(bank) == [0])
        if beams > 1:
            assert len(engine.generate(PROMPT, version, free(num_beams=beams)).result(20).tokens) == 12
        else:
            assert not engine.alive  # /health says so


def test_a_fault_in_placing_ends_its_texts_and_not_the_thread_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base() -> Any:
        return tiny.bert(vocab_size=258)

    folder = saved("bert", tmp_path / "a", base=base, modules_to_save=["classifier"])
    with Bank(base()) as bank, Engine(bank.model, tokenizer(), bank, Limits(seconds=20)) as engine:
        version = bank.load(folder, "a")
        with monkeypatch.context() as patch:
            patch.setattr(bank, "place", _out_of_memory)
            with pytest.raises(ServeError, match="no memory"):
                engine.classify(["one"], version)
        assert isinstance(engine._rows, RowsThread)
        assert len(engine.classify(["one"], version)) == 1
        assert users(bank) == [0]


def _out_of_memory(*_: Any) -> bool:
    raise RuntimeError("no memory")


def test_rolling_back_to_what_does_not_load_changes_nothing(tmp_path: Path) -> None:
    base = app_kit.save_base(tmp_path / "base")
    one, two = (app_kit.grown(base, tmp_path / str(k), k) for k in range(2))
    with Server(base, tmp_path / "registry", ServerConfig(warm=False)) as server:
        first, second = server.publish("sql", one), server.publish("sql", two)
    tensors = tmp_path / "registry" / ".versions" / first.removeprefix("sha256:") / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with Server(base, tmp_path / "registry", ServerConfig(warm=False)) as server:
        with pytest.raises(FileError):
            server.roll_back("sql")
        assert [info.hash for info in server.adapters()] == [second]
        assert server.generate(["x"], "sql", free())[0].adapter == second


def test_a_pin_follows_its_name(tmp_path: Path) -> None:
    base = app_kit.save_base(tmp_path / "base")
    with Server(base, tmp_path / "registry", ServerConfig(warm=False)) as server:
        for k in range(3):
            digest = server.publish("sql", app_kit.grown(base, tmp_path / str(k), k))
            server.pin("sql")
            assert [one.version.hash for one in server.bank.resident() if one.pinned] == [digest]
        server.pin("sql", False)
        assert not any(one.pinned for one in server.bank.resident())


def test_loading_after_the_end_is_refused(tmp_path: Path) -> None:
    base = app_kit.save_base(tmp_path / "base")
    server = Server(base, tmp_path / "registry", ServerConfig(warm=False))
    server.publish("sql", app_kit.grown(base, tmp_path / "a", 1))
    server.residents.keep(set())
    server.close()
    with pytest.raises(ServeError, match="closed"):
        server.find("sql", wait=True)


def test_the_server_is_never_the_first_to_hang_up() -> None:
    import httpx
    import openai

    kept = uvicorn_settings(None, ListenConfig()).timeout_keep_alive
    assert kept > 2 * max(httpx.Limits().keepalive_expiry or 0, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry or 0)


def test_a_stream_hears_every_token_from_another_thread() -> None:
    handle = Handle(1, None, lambda _: None)

    def make() -> None:
        for token in range(5000):
            handle.push([token])
        handle.finish(handle.tokens, "", "length")

    async def read() -> list[int]:
        thread = threading.Thread(target=make)
        got: list[int] = []
        thread.start()
        async for tokens in new_tokens(handle):
            got += tokens
        thread.join()
        again = [token async for tokens in new_tokens(handle) for token in tokens]  # of an answer that is done
        assert again == got
        return got

    async def bounded() -> list[int]:
        return await asyncio.wait_for(read(), 20)

    assert asyncio.run(bounded()) == list(range(5000))
