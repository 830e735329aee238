"""OpenAI's routes, with OpenAI's own client: each adapter's answer is what it gives alone."""

import asyncio
import json
import threading
from pathlib import Path

import httpx
import openai
import pytest
import serve_app_kit as kit
from pydantic import ValidationError
from serve_app_kit import API_KEY, Listening, expected, grown, hash_of, idle, listening, until

from lorakit.errors import ServeError
from lorakit.serve.bank import Bank
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.openai import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from lorakit.serve.server import ServerConfig

PROMPTS = ["one two", "a red cat", "moon"]
TOKENS = 12
CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("routes")
    base = kit.save_base(root / "base")
    for seed, name in enumerate(("sql", "fr", "de")):
        grown(base, root / "adapters" / name, seed, r=2 + 2 * seed)
    return root


@pytest.fixture(scope="module")
def up(place):
    with listening(str(place / "base"), place / "adapters") as found:
        until(lambda: found.server.warmed)
        yield found


def answers(place: Path, name: str | None, prompts=PROMPTS, tokens=TOKENS, **fields):
    return expected(str(place / "base"), None if name is None else place / "adapters" / name, prompts, tokens, **fields)


def test_models_have_their_base_as_parent(up, place):
    models = {one.id: one for one in up.openai().models.list()}
    assert set(models) == {"base", "sql", "fr", "de"}
    assert models["base"].parent is None
    for name in ("sql", "fr", "de"):
        assert models[name].parent == "base"
        assert models[name].adapter == hash_of(place / "adapters" / name)
    assert up.openai().models.retrieve("sql").id == "sql"
    for unknown in ("nope", "../../etc/passwd", "a/b"):
        with pytest.raises(openai.NotFoundError):
            up.openai().models.retrieve(unknown)


def test_completions_are_each_adapters_own(up, place):
    client, seen = up.openai(), set()
    for name in ("base", "sql", "fr", "de"):
        folder = None if name == "base" else name
        raw = client.completions.with_raw_response.create(model=name, prompt=PROMPTS, max_tokens=TOKENS)
        answer = raw.parse()
        assert [choice.text for choice in answer.choices] == answers(place, folder)
        digest = None if folder is None else hash_of(place / "adapters" / name)
        assert answer.adapter == digest
        assert raw.headers["x-lorakit-adapter"] == (digest or "base")
        assert answer.model == name
        assert answer.usage.completion_tokens == len(PROMPTS) * TOKENS
        seen.add(answer.choices[0].text)
    assert len(seen) == 4  # the adapters differ, so the comparison says something


def test_chat_whole_and_streamed(up, place):
    client = up.openai()
    (text,) = answers(place, "fr", [CHAT])
    whole = client.chat.completions.create(model="fr", messages=CHAT, max_completion_tokens=TOKENS, temperature=0)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    again = client.chat.completions.create(
        model="fr", messages=[CHAT[0], {"role": "user", "content": parts}], max_tokens=TOKENS
    )
    assert again.choices[0].message.content == text
    stream = client.chat.completions.create(
        model="fr", messages=CHAT, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.adapter for chunk in chunks} == {hash_of(place / "adapters" / "fr")}
    assert stream.response.headers["x-lorakit-adapter"] == hash_of(place / "adapters" / "fr")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == TOKENS


def test_stop_texts(up, place):
    (text,) = answers(place, "sql", PROMPTS[:1])
    stop = text[4:6]
    (cut,) = answers(place, "sql", PROMPTS[:1], stop=(stop,))
    call = {"model": "sql", "prompt": PROMPTS[0], "max_tokens": TOKENS, "stop": [stop, "never seen"]}
    whole = up.openai().completions.create(**call)
    assert whole.choices[0].text == cut == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    parts = [chunk.choices[0].text for chunk in up.openai().completions.create(**call, stream=True)]
    assert "".join(parts) == cut


def test_ids_versions_aliases_and_sampling(up, place):
    client, digest = up.openai(), hash_of(place / "adapters" / "de")
    ids = up.server.encode(PROMPTS[0])
    up.server.alias("prod", "de")
    try:
        (text,) = answers(place, "de", PROMPTS[:1])
        for model in ("de", "prod", f"de@{digest}", f"de@{digest[7:19]}"):
            answer = client.completions.create(model=model, prompt=ids, max_tokens=TOKENS)
            assert (answer.choices[0].text, answer.adapter, answer.model) == (text, digest, model)
    finally:
        up.server.drop_alias("prod")
    call = {"model": "de", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 1.5, "seed": 7}
    first, second = (client.completions.create(**call).choices[0].text for _ in range(2))
    assert first == second != text


def test_many_clients_at_once(up, place):
    async def ask() -> list[tuple[str, int, str]]:
        async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key=API_KEY, max_retries=0) as client:

            async def one(name: str, row: int) -> tuple[str, int, str]:
                stream = await client.completions.create(
                    model=name, prompt=PROMPTS[row], max_tokens=TOKENS, stream=True
                )
                return name, row, "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(name, row) for row in range(3) for name in ("base", "sql", "fr", "de")))

    wanted = {name: answers(place, None if name == "base" else name) for name in ("base", "sql", "fr", "de")}
    for name, row, text in asyncio.run(ask()):
        assert text == wanted[name][row], (name, row)
    until(lambda: idle(up.server))


GOOD = {"model": "sql", "prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize(
    ("route", "body", "status", "code"),
    [
        ("completions", {**GOOD, "model": "nope"}, 404, "model_not_found"),
        ("completions", {**GOOD, "model": "../sql"}, 404, "model_not_found"),
        ("completions", {**GOOD, "model": "sql@abcdef012345"}, 404, "model_not_found"),
        ("completions", {**GOOD, "model": "sql\r\nX-Evil: 1"}, 404, "model_not_found"),
        ("completions", {**GOOD, "model": 3}, 400, "invalid_body"),
        ("completions", {**GOOD, "max_tokens": 0}, 400, "invalid_body"),
        ("completions", {**GOOD, "max_tokens": "7"}, 400, "invalid_body"),
        ("completions", {**GOOD, "max_tokens": 10**9}, 400, "context_length_exceeded"),
        ("completions", {**GOOD, "prompt": "x" * 600}, 400, "context_length_exceeded"),
        ("completions", {**GOOD, "temperature": -1}, 400, "invalid_body"),
        ("completions", {**GOOD, "n": 2}, 400, "invalid_body"),
        ("completions", {**GOOD, "logit_bias": {"1": 5}}, 400, "invalid_body"),
        ("completions", {**GOOD, "surprise": 1}, 400, "invalid_body"),
        ("completions", {**GOOD, "logprobs": 0}, 400, "invalid_body"),
        ("completions", {**GOOD, "n": True}, 400, "invalid_body"),
        ("completions", {**GOOD, "model": None}, 400, "invalid_body"),
        ("completions", {**GOOD, "prompt": ""}, 400, "invalid_body"),
        ("completions", {**GOOD, "prompt": []}, 400, "invalid_body"),
        ("completions", {**GOOD, "prompt": [10**12]}, 400, "invalid_value"),
        ("completions", {**GOOD, "prompt": [-1]}, 400, "invalid_value"),
        ("completions", {**GOOD, "prompt": ["x"] * 65}, 400, "invalid_body"),
        ("completions", {**GOOD, "prompt": ["x", "y"], "stream": True}, 400, "invalid_value"),
        ("completions", {**GOOD, "stop": [""]}, 400, "invalid_body"),
        ("completions", {**GOOD, "num_beams": 4, "temperature": 1.0}, 400, "invalid_value"),
        ("completions", [], 400, "invalid_body"),
        ("chat/completions", {"model": "sql", "messages": []}, 400, "invalid_body"),
        ("chat/completions", {"model": "sql", "messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_body"),
        ("embeddings", {"model": "sql", "input": "x"}, 400, "wrong_kind"),
        ("classify", {"model": "sql", "input": ["x", ["a", "b"]]}, 400, "wrong_kind"),
        ("nothing", GOOD, 404, "unknown_route"),
    ],
)
def test_errors_in_openais_shape(up, route, body, status, code):
    answer = up.client().post(f"/v1/{route}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert "x-evil" not in answer.headers
    assert str(up.server.registry.folder) not in answer.text


@pytest.mark.parametrize(
    ("content", "kind", "statuses"),
    [
        (b"{", "application/json", {400}),
        (b"\xff\xfe{}", "application/json", {400}),
        (b"[" * 200_000, "application/json", {400}),
        (b'{"model": "sql", "prompt": "x", "temperature": NaN}', "application/json", {400}),
        (b'{"model": "sql", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "application/json", {400}),
        (json.dumps(GOOD).encode(), "text/plain", {400, 415}),  # what a page of another site may send unasked
        (b"", "application/json", {400}),
    ],
)
def test_malformed_bodies(up, content, kind, statuses):
    with up.client() as client:
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert answer.status_code in statuses
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert client.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_half_a_character_is_400(up, route):
    half = "x\ud800y"
    body = {"prompt": [half]} if route == "completions" else {"messages": [{"role": "user", "content": half}]}
    content = json.dumps({"model": "sql", "max_tokens": 2, **body}).encode()  # escaped, as JSON allows
    answer = up.client().post(f"/v1/{route}", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input")
    assert "lone surrogate" in answer.json()["error"]["message"]
    assert answer.json()["error"]["message"].isprintable()


def test_what_clients_send_back_and_leave_null(up, place):
    client = up.openai()
    (text,) = answers(place, "fr", [CHAT])
    first = client.chat.completions.create(model="fr", messages=CHAT, max_tokens=TOKENS).choices[0].message
    history = [*CHAT, first.model_dump(), {"role": "user", "content": "more", "name": None}]
    assert {"refusal", "annotations", "audio", "function_call", "tool_calls"} <= set(history[2])
    plain = [*CHAT, {"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model="fr", messages=history, max_tokens=TOKENS).choices[0].message
    assert second.content == answers(place, "fr", [plain])[0]
    empty = ("service_tier", "top_k", "num_beams", "repetition_penalty", "ignore_eos", "tools", "seed", "stop", "store",
             "stream_options", "prediction", "metadata", "max_completion_tokens")  # fmt: skip
    body = {"model": "fr", "messages": CHAT, "max_tokens": TOKENS} | dict.fromkeys(empty)
    answer = up.client().post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == text
    for fields in ({"logprobs": False}, {"presence_penalty": 0, "n": 1}, {"frequency_penalty": 0.0, "echo": False}):
        assert up.client().post("/v1/completions", json=GOOD | fields).status_code == 200, fields


LONG = 50_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [1, *[""] * LONG]}),
        (CompletionRequest, {"prompt": ["", *[1] * LONG]}),
        (CompletionRequest, {"prompt": [[1], *[""] * LONG]}),
        (CompletionRequest, {"prompt": [[""] * LONG]}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * LONG}),
        (CompletionRequest, {"prompt": "x", "metadata": {str(k): 1 for k in range(LONG)}}),
        (CompletionRequest, {"prompt": "x", "stream_options": {str(k): 1 for k in range(LONG)}}),
        (CompletionRequest, {"prompt": "x"} | {str(k): 1 for k in range(LONG)}),
        (ChatRequest, {"messages": [1] * 1000}),
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * LONG}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": ""} | {str(k): 1 for k in range(LONG)}]}),
        (EmbeddingRequest, {"input": ["", *[1] * LONG]}),
        (EmbeddingRequest, {"input": [1] * LONG}),
        (ClassifyRequest, {"input": [1] * LONG}),
        (ClassifyRequest, {"input": [[1] * LONG]}),
        (ClassifyRequest, {"input": [["a", 1]] * LONG}),
    ],
)
def test_a_long_body_has_few_errors(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "sql"} | body)
    assert caught.value.error_count() <= 4


def test_all_prompts_of_a_request_are_answered_by_one_version(place, tmp_path, monkeypatch):
    first, second = (place / "adapters" / name for name in ("sql", "fr"))
    with listening(str(place / "base"), tmp_path / "adapters") as up:
        up.server.publish("x", first)
        real = up.server.encode

        def encode(prompt, index=0):
            if index == 1:
                up.server.publish("x", second)
            return real(prompt, index)

        monkeypatch.setattr(up.server, "encode", encode)
        body = {"model": "x", "prompt": PROMPTS, "max_tokens": TOKENS}
        answer = up.client().post("/v1/completions", json=body)
        assert [one["text"] for one in answer.json()["choices"]] == answers(place, "sql")
        assert answer.json()["adapter"] == hash_of(first) != up.server.registry.resolve("x").hash


def test_what_cannot_be_loaded_now_is_503_and_then_200(place, tmp_path, monkeypatch):
    real, faults = Bank.load, [OSError("the disk"), ServeError("no room")]

    def load(self, *words, **fields):
        if faults:
            raise faults.pop()
        return real(self, *words, **fields)

    with listening(str(place / "base"), tmp_path / "adapters", config=ServerConfig(warm=False)) as up:
        up.server.registry.publish("x", place / "adapters" / "sql")
        monkeypatch.setattr(Bank, "load", load)
        client, statuses = up.client(), []

        def answered():
            answer = client.post("/v1/completions", json={**GOOD, "model": "x"})
            statuses.append(answer.status_code)
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
            return answer.status_code == 200

        until(answered)
        assert not faults
        assert set(statuses) == {503, 200}


def _stream(up: Listening, tokens: int) -> httpx.Response:
    body = {"model": "sql", "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    client = up.client()
    return client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)


def test_a_client_that_leaves_frees_its_slot(up):
    before = up.server.engine.stats().cancelled
    response = _stream(up, 450)
    lines = response.iter_lines()  # kept: an iterator that goes closes the connection
    next(lines)
    assert up.server.engine.stats().running == 1
    response.close()
    until(lambda: idle(up.server))
    connection = up.connect()
    body = json.dumps({"model": "sql", "prompt": "x", "max_tokens": 450, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: up.server.engine.stats().running == 1)
    connection.close()
    until(lambda: idle(up.server))
    assert up.server.engine.stats().cancelled == before + 2


def test_a_full_queue_is_429(place, tmp_path):
    config = ServerConfig(limits=Limits(queue=1))
    with listening(str(place / "base"), tmp_path / "none", config=config) as up, up.client() as client:
        held = up.server.submit("x", None, SamplingParams(max_new_tokens=450, ignore_eos=True))
        body = {"model": "base", "prompt": "x", "max_tokens": 2}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        held.cancel()
        until(lambda: idle(up.server))
        assert client.post("/v1/completions", json=body).status_code == 200


def test_state_and_metrics(up):
    with httpx.Client(base_url=up.url) as anyone:
        assert anyone.get("/health").json() == {"status": "ok"}
        assert anyone.get("/ready").json() == {"status": "ready"}
        assert anyone.get("/metrics").status_code == 401
    from prometheus_client.parser import text_string_to_metric_families

    with up.client() as client:
        client.post("/v1/completions", json=GOOD)
        client.post("/v1/completions", json={**GOOD, "model": "no-such-name"})
        text = client.get("/metrics").text
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[("lorakit_requests_total", (("adapter", "sql"), ("route", "completions")))] >= 1
    assert samples[("lorakit_tokens_total", (("adapter", "sql"), ("kind", "new")))] >= 2
    assert samples[("lorakit_http_total", (("route", "/v1/completions"), ("status", "404")))] >= 1
    assert samples[("lorakit_request_seconds_count", (("route", "/v1/completions"),))] >= 2
    assert sum(value for (name, _), value in samples.items() if name == "lorakit_adapters") == 3
    assert samples[("lorakit_bank_total", (("event", "device_copies"),))] >= 1
    assert "no-such-name" not in text


def test_loading_is_503_and_wrong_bases_are_refused(place, tmp_path, monkeypatch):
    folder, gate, real = tmp_path / "adapters", threading.Event(), Bank.load
    grown(str(place / "base"), folder / "slow", 5)
    kit.adapter_folder(folder / "foreign")  # of a base with another vocabulary's size, and other values

    def load(self, *arguments, **fields):
        gate.wait(30)
        return real(self, *arguments, **fields)

    monkeypatch.setattr(Bank, "load", load)
    with listening(str(place / "base"), folder) as up, up.client() as client:
        answer = client.post("/v1/completions", json={**GOOD, "model": "slow"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_loading")
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json={**GOOD, "model": "base"}).status_code == 200
        gate.set()
        until(lambda: up.server.warmed)
        assert client.get("/ready").status_code == 200
        assert client.post("/v1/completions", json={**GOOD, "model": "slow"}).status_code == 200
        answer = client.post("/v1/completions", json={**GOOD, "model": "foreign"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_refused")
        assert str(folder) not in answer.text
        listed = {one["name"]: one for one in up.admin().get("/v1/adapters").json()["data"]}
        assert listed["foreign"]["state"] == "refused"
        assert "base" in listed["foreign"]["reason"]


def test_time_is_up(place, tmp_path):
    config = ServerConfig(limits=Limits(seconds=0.01))
    with listening(str(place / "base"), tmp_path / "none", config=config) as up:
        body = {"model": "base", "prompt": "x", "max_tokens": 500, "ignore_eos": True}
        answer = up.client().post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timed_out")
        streamed = up.client().post("/v1/completions", json={**body, "stream": True}).text  # its status is sent before
        assert json.loads(streamed.strip().rpartition("data: ")[2])["error"]["code"] == "timed_out"
        until(lambda: idle(up.server))
