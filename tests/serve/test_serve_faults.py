"""What a sceptical operator and an attacker found: names of labels, expressions that never end, holds that were not given
back, threads that died in silence, versions that do not load."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import serve_app_kit as app_kit
import tiny
from serve_kit import BASES, saved, tokenizer

import lorakit as lk
from lorakit.errors import AdapterLoadingError, DataError, FileError, LorakitError, ServeError, UsageError
from lorakit.serve.bank import Bank
from lorakit.serve.classify import RowsThread
from lorakit.serve.engine import Engine
from lorakit.serve.follow import TextStream, new_tokens
from lorakit.serve.handle import Handle
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.listen import ListenConfig, uvicorn_settings
from lorakit.serve.problems import problem_of
from lorakit.serve.registry import Registry, Release
from lorakit.serve.residents import Residents
from lorakit.serve.sample import no_choice
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
        app_kit.until(lambda: users(bank) == [0] and not engine.works)  # the loader's thread tells of the fault first


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


def release(folder: Path) -> Release:
    return Release(folder.name, app_kit.hash_of(folder), folder)


@pytest.mark.parametrize("fault", [ServeError("no room"), OSError("the disk"), MemoryError(), RuntimeError("no idea")])
def test_what_may_pass_is_tried_again(fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = release(saved("llama", tmp_path / "a"))
    with Bank(BASES["llama"]()) as bank:
        residents = Residents(bank)
        with monkeypatch.context() as patch:
            patch.setattr(bank, "load", _raises(fault))
            for _ in range(2):
                with pytest.raises(AdapterLoadingError) as caught:
                    residents.wait(one)
                assert caught.value.retry_after > 0
                assert (residents.presence(one.hash), residents.reason(one.hash)) == ("absent", None)
            with pytest.raises(AdapterLoadingError):
                residents.get(one)
            app_kit.until(lambda: residents.presence(one.hash) == "absent")
        assert residents.wait(one).hash == one.hash
        residents.close()


@pytest.mark.parametrize("place", ["lorakit.store.header.open", "pathlib.Path.read_text"])
def test_a_file_that_cannot_be_read_now_is_no_refusal(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = release(saved("llama", tmp_path / "a"))
    with Bank(BASES["llama"]()) as bank:
        residents = Residents(bank)
        with monkeypatch.context() as patch:
            patch.setattr(place, _raises(OSError(errno.EMFILE, "Too many open files")), raising=False)
            with pytest.raises(AdapterLoadingError, match="Too many open files"):
                residents.wait(one)
            assert residents.presence(one.hash) == "absent"
        assert residents.wait(one).hash == one.hash
        residents.close()


@pytest.mark.parametrize("fault", [FileError("bad", ["one", "two"]), UsageError("a rank of 10,000")])
def test_a_refusal_stays_and_each_caller_has_an_error_of_its_own(
    fault: LorakitError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = release(saved("llama", tmp_path / "a"))
    with Bank(BASES["llama"]()) as bank:
        residents, loads = Residents(bank), []
        monkeypatch.setattr(bank, "load", lambda *_, **fields: loads.append(1) or _raises(fault)())
        found = []
        for call in [residents.wait] * 3 + [residents.get] * 20:
            with pytest.raises(type(fault)) as caught:
                call(one)
            found.append(caught.value)
        assert len(loads) == 1
        assert len({id(error) for error in found}) == len(found)
        assert {str(error) for error in found} == {str(fault)} == {residents.reason(one.hash)}
        assert {len(_frames(error)) for error in found[3:]} == {len(_frames(found[3]))}
        kept = residents._loads[one.hash].exception()
        assert kept is not None
        assert {"_load", "run"} >= set(_frames(kept))  # neither a request's frames, nor the load's with its tensors
        assert kept.__context__ is None
        residents.close()


def _frames(error: BaseException) -> list[str]:
    found, at = [], error.__traceback__
    while at is not None:
        found.append(at.tb_frame.f_code.co_name)
        at = at.tb_next
    return found


def _raises(fault: Exception) -> Any:
    def load(*_: Any, **fields: Any) -> Any:
        raise fault

    return load


def test_versions_that_go_while_they_are_looked_at(tmp_path: Path) -> None:
    with Bank(BASES["llama"]()) as bank:
        residents = Residents(bank)
        done = residents._workers.submit(lambda: None)
        done.result(20)
        refused = residents._workers.submit(_raises(FileError("bad")))
        assert refused.exception(20)

        class Going(dict[str, Any]):
            """Gives what is asked for once: another thread takes it away behind that."""

            def get(self, key: str, default: Any = None) -> Any:
                return self.pop(key, default)

        residents._loads = Going(ready=done, refused=refused)
        assert residents.reason("refused") == "bad"
        assert residents.found("ready") is None
        assert residents.presence("ready") == "absent"
        residents.close()


def _pinned_registry(tmp_path: Path) -> tuple[str, int]:
    """A base, and a registry of three adapters of one size, two of them pinned."""
    base = app_kit.save_base(tmp_path / "base")
    with Server(base, tmp_path / "registry", ServerConfig(warm=False)) as server:
        for k, name in enumerate("abc"):
            server.publish(name, app_kit.grown(base, tmp_path / name, k))
        server.pin("a")
        server.pin("b")
        return base, next(info.bytes for info in server.adapters() if info.bytes)


def test_pins_that_do_not_fit_leave_the_server_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, size = _pinned_registry(tmp_path)
    waits: list[tuple[str, float]] = []
    load, acquire = Bank.load, Bank.acquire

    def loaded(self: Bank, folder: Path, name: str, *, patience: float) -> Any:
        waits.append((name, patience))
        return load(self, folder, name, patience=min(patience, 0.1))

    def acquired(self: Bank, version: Any, *, patience: float = 60.0) -> None:
        waits.append((f"pin {version.name}", patience))
        acquire(self, version, patience=patience)

    monkeypatch.setattr("lorakit.serve.shelf.PIN_SECONDS", 0.1)
    monkeypatch.setattr(Bank, "load", loaded)
    monkeypatch.setattr(Bank, "acquire", acquired)
    with Server(base, tmp_path / "registry", ServerConfig(memory=int(size * 1.5))) as server:
        app_kit.until(lambda: server.warmed)
        assert [info.state for info in server.adapters()] == ["ready", "absent", "absent"]
        at = waits.index(("b", 0.1))
        assert waits[:2] == [("a", 0.1), ("pin a", 0.1)]
        assert waits[at:] == [("b", 0.1), ("c", 0.0)]  # no wait where many do not fit
        assert server.generate(["x"], "a", free())[0].adapter == app_kit.hash_of(tmp_path / "a")
        with pytest.raises(AdapterLoadingError, match="do not fit"):
            server.generate(["x"], "b", free())
        server.pin("a", False)
        assert server.generate(["x"], "b", free())[0].adapter == app_kit.hash_of(tmp_path / "b")


@pytest.mark.parametrize("what", ["load", "pin"])
def test_a_fault_that_nobody_foresaw_leaves_the_server_ready(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, _ = _pinned_registry(tmp_path)
    real = getattr(Bank, what)

    def broken(self: Bank, *words: Any, **fields: Any) -> Any:
        if "a" in (words[-1], getattr(words[0], "name", None)):
            raise RuntimeError("a bug")
        return real(self, *words, **fields)

    monkeypatch.setattr(Bank, what, broken)
    with Server(base, tmp_path / "registry") as server:
        app_kit.until(lambda: server.warmed)
        states = {info.name: info.state for info in server.adapters()}
        assert states == {"a": "absent" if what == "load" else "ready", "b": "ready", "c": "ready"}
        assert {one.version.name for one in server.bank.resident() if one.pinned} == {"b"}
    assert any("adapter a was not made ready" in record.getMessage() for record in caplog.records)


def test_closing_does_not_wait_for_the_pins_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, size = _pinned_registry(tmp_path)
    load, room, waits = Bank.load, Bank._room, threading.Event()

    def looked(self: Bank, wanted: int) -> bool:
        if not (found := room(self, wanted)):
            waits.set()
        return found

    monkeypatch.setattr("lorakit.serve.shelf.PIN_SECONDS", 600.0)
    monkeypatch.setattr(Bank, "load", lambda self, *words, **fields: load(self, *words, patience=600.0))
    monkeypatch.setattr(Bank, "_room", looked)
    server = Server(base, tmp_path / "registry", ServerConfig(memory=int(size * 1.5)))
    assert waits.wait(30)
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 30


def test_pinning_a_name_out_of_service_counts_when_it_is_back(tmp_path: Path) -> None:
    base = app_kit.save_base(tmp_path / "base")
    with Server(base, tmp_path / "registry", ServerConfig(warm=False)) as server:
        server.publish("sql", app_kit.grown(base, tmp_path / "a", 0))
        server.unload("sql")
        server.pin("sql")
        assert [(info.state, info.pinned) for info in server.adapters()] == [("unloaded", True)]
        server.load("sql")
        assert [one.pinned for one in server.bank.resident()] == [True]
        server.unload("sql")
        server.pin("sql", False)
        server.load("sql")
        assert [one.pinned for one in server.bank.resident()] == [False]
        assert not server.registry.entries()["sql"].pinned


def test_a_pin_that_cannot_be_held_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = app_kit.save_base(tmp_path / "base")
    with Server(base, tmp_path / "registry", ServerConfig(warm=False)) as server:
        server.publish("sql", app_kit.grown(base, tmp_path / "a", 0))
        monkeypatch.setattr(server.bank, "pin", _raises(ServeError("no room")))
        with pytest.raises(ServeError, match="no room"):
            server.pin("sql")
        assert not server.registry.entries()["sql"].pinned


def test_the_bases_name_is_no_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = app_kit.save_base(tmp_path / "mine")
    folder = tmp_path / "registry"
    for k, name in enumerate(("mine", "sql")):
        app_kit.grown(base, folder / name, k)
    with Server(base, folder) as server:
        assert list(server.registry.entries()) == ["sql"]
        assert "base's own name" in server.registry.refused["mine"]
        assert any("'mine' was not taken in" in record.getMessage() for record in caplog.records)
    shutil.rmtree(folder / "mine")
    Registry(folder).publish("mine", app_kit.grown(base, tmp_path / "x", 2))  # for a base of another name, say
    with Server(base, folder) as server:
        app_kit.until(lambda: server.warmed)
        assert "mine" in server.registry.refused
        assert {info.name: info.state for info in server.adapters()} == {"mine": "refused", "sql": "ready"}
        assert [name for name, _, _ in server.in_service()] == ["sql"]
        assert server.generate(["x"], "mine", free())[0].adapter is None


def test_a_version_whose_folder_became_a_link_is_told_of_alone(tmp_path: Path) -> None:
    base = app_kit.save_base(tmp_path / "base")
    for k, name in enumerate(("fr", "sql")):
        app_kit.grown(base, tmp_path / "registry" / name, k)
    with Server(base, tmp_path / "registry") as server:
        app_kit.until(lambda: server.warmed)
        own = server.registry.resolve("fr").folder
        own.rename(tmp_path / "elsewhere")
        own.symlink_to(tmp_path / "elsewhere")
        assert [name for name, _, _ in server.in_service()] == ["sql"]
        server.alias("other", "sql")
        assert [name for name, _, _ in server.in_service()] == ["other", "sql"]
        with pytest.raises(FileError, match="leads out"):
            server.generate(["x"], "fr", free())
        assert server.generate(["x"], "other", free())[0].adapter is not None


@pytest.mark.parametrize(
    "prompt", ["a \ud800 b", [{"role": "user", "content": "\udfff"}], [{"role": "\ud800", "content": "x"}]]
)
def test_half_a_character_is_no_text(prompt: Any, tmp_path: Path) -> None:
    base = app_kit.save_base(tmp_path / "base")
    with Server(base, tmp_path / "registry") as server, pytest.raises(DataError, match="lone surrogate"):
        server.generate(["fine", prompt])


def test_a_client_is_told_that_its_logits_are_not_finite_and_of_no_other_fault_in_the_engine() -> None:
    told, hidden = problem_of(no_choice()), problem_of(ServeError("/secret/path"))
    assert (told.status, told.code, hidden.status, hidden.code) == (500, "not_finite", 500, "engine_failed")
    assert "finite logits" in told.message
    assert "secret" not in hidden.message
