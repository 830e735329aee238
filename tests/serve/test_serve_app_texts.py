"""Classes and embeddings over HTTP and in process: each adapter with its own head, each text as it is alone."""

import base64
import json
import struct
import threading

import adapting
import openai
import pytest
import runs
import tiny
import torch
from serve_app_kit import API_KEY, hash_of, idle, listening, until

import lorakit as lk
from lorakit.generate import classify
from lorakit.models import load
from lorakit.serve.limits import Limits
from lorakit.serve.server import Server, ServerConfig

TEXTS = ["red dog", "one two three", "a", ("moon", "sun")]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A base of three labels, an adapter without a head of its own, and one with a head for five."""
    root = tmp_path_factory.mktemp("classes")
    base = runs.save_model(root / "base", tiny.roberta)
    for seed, (name, fields) in enumerate({"plain": {}, "five": {"num_labels": 5}}.items()):
        torch.manual_seed(seed)
        model = load(base, task="sequence-classification", **fields).model
        head = {"modules_to_save": ["classifier"]} if fields else {}
        lk.attach(model, lk.LoRA(r=4, target_modules=["query", "value"], **head), seed=seed)
        adapting.grow(model, "default", seed, std=0.3)
        lk.save(model, root / "adapters" / name)
    return root


@pytest.fixture(scope="module")
def up(classes):
    config = ServerConfig(task="sequence-classification", limits=Limits(queue=8))
    with listening(str(classes / "base"), classes / "adapters", config=config) as found:
        until(lambda: found.server.warmed)
        yield found


def alone(classes, name, texts):
    fields = {"num_labels": 5} if name == "five" else {}
    loaded = load(str(classes / "base"), task="sequence-classification", **fields)
    if name != "base":
        lk.load(loaded.model, classes / "adapters" / name)
    return [one.scores for one in classify(loaded.model, loaded.tokenizer, texts)]


@pytest.mark.parametrize("name", ["base", "plain", "five"])
def test_classify_is_what_the_adapter_says_alone(up, classes, name):
    rows = [list(text) if isinstance(text, tuple) else text for text in TEXTS] * 5  # more than the queue takes at once
    answer = up.client().post("/v1/classify", json={"model": name, "input": rows})
    assert answer.status_code == 200, answer.text
    digest = None if name == "base" else hash_of(classes / "adapters" / name)
    assert answer.headers["x-lorakit-adapter"] == (digest or "base")
    body = answer.json()
    assert body["adapter"] == digest
    assert [one["index"] for one in body["data"]] == list(range(len(rows)))
    for one, scores in zip(body["data"], alone(classes, name, TEXTS) * 5, strict=True):
        assert list(one["scores"].values()) == pytest.approx(scores, abs=1e-5)
        assert one["label"] == max(one["scores"], key=one["scores"].get)
    until(lambda: idle(up.server))


def test_a_mixture_in_process(up, classes):
    names = ["five", None, "plain", "five"]
    found = up.server.classify(TEXTS, names)
    for one, name, text in zip(found, names, TEXTS, strict=True):
        assert list(one.scores.values()) == pytest.approx(alone(classes, name or "base", [text])[0], abs=1e-5)


def test_other_routes_say_that_they_do_not_answer(up):
    body = {"model": "plain", "prompt": "x"}
    answer = up.client().post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_kind")
    assert "classification" in answer.json()["error"]["message"]
    for inputs in ([], [""], [["a", "b", "c"]], [1], ["x" * 1000], ["x"] * 3000):
        assert up.client().post("/v1/classify", json={"model": "plain", "input": inputs}).status_code == 400
    assert up.client().post("/v1/classify", json={"model": "nope", "input": "x"}).status_code == 404


def test_embeddings_with_openais_client(tmp_path):
    base = runs.save_model(tmp_path / "base", tiny.bert)
    model = load(base, task="feature-extraction").model
    lk.attach(model, lk.LoRA(r=4, target_modules=["value"]))
    adapting.grow(model, "default", 0, std=1.0)
    lk.save(model, tmp_path / "adapters" / "near")
    texts = ["red dog", "one two three"]
    with listening(base, tmp_path / "adapters", config=ServerConfig(task="feature-extraction")) as up:
        until(lambda: up.server.warmed)
        vectors = {}
        for name in ("base", "near"):
            answer = up.openai().embeddings.create(model=name, input=texts)  # the client asks for base64 by itself
            vectors[name] = torch.tensor([one.embedding for one in answer.data])
            assert answer.adapter == (None if name == "base" else hash_of(tmp_path / "adapters" / "near"))
        raw = (
            up.client()
            .post("/v1/embeddings", json={"model": "near", "input": texts, "encoding_format": "float"})
            .json()
        )
        assert torch.tensor([one["embedding"] for one in raw["data"]]).sub(vectors["near"]).abs().max() < 1e-6
        packed = up.client().post(
            "/v1/embeddings", json={"model": "near", "input": texts[0], "encoding_format": "base64"}
        )
        data = base64.b64decode(packed.json()["data"][0]["embedding"])
        assert torch.tensor(struct.unpack(f"<{len(data) // 4}f", data)).sub(vectors["near"][0]).abs().max() < 1e-6
        with pytest.raises(openai.BadRequestError, match="embedding"):
            up.openai().chat.completions.create(model="near", messages=[{"role": "user", "content": "x"}])
    tokenizer = load(base, task="feature-extraction").tokenizer
    for text, vector in zip(texts, vectors["near"], strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = states.mean(0) / states.mean(0).norm()
        assert (wanted - vector).abs().max() < 1e-5
    assert (vectors["near"] - vectors["base"]).abs().max() > 1e-3


def test_pairs_and_many_texts_of_many_adapters(classes):
    config = ServerConfig(task="sequence-classification", limits=Limits(queue=4))
    with Server(str(classes / "base"), classes / "adapters", config) as server:
        names = ["five", "plain", None] * 8
        found = server.classify(["red dog"] * len(names), names)
    assert [len(one.scores) for one in found] == [5, 3, 3] * 8


def test_one_answer_is_of_one_version(classes, tmp_path, monkeypatch):
    config = ServerConfig(task="sequence-classification", limits=Limits(queue=8), warm=False)
    with Server(str(classes / "base"), tmp_path / "own", config) as server:
        server.publish("x", classes / "adapters" / "plain")
        real, calls = server.engine.classify, []

        def classify(rows, version):
            calls.append(version.hash)
            if len(calls) == 2:  # amid the pieces of a request
                server.publish("x", classes / "adapters" / "five")
            return real(rows, version)

        monkeypatch.setattr(server.engine, "classify", classify)
        found = server.classify(["red dog"] * 20, "x")
        assert len(calls) == 5
        assert {one.adapter for one in found} == {hash_of(classes / "adapters" / "plain")}
        assert server.classify(["red dog"], "x")[0].adapter == hash_of(classes / "adapters" / "five")


def test_a_version_that_goes_amid_a_request_has_it_answered_anew(classes, tmp_path, monkeypatch):
    config = ServerConfig(task="sequence-classification", limits=Limits(queue=8), warm=False)
    with Server(str(classes / "base"), tmp_path / "own", config) as server:
        server.publish("x", classes / "adapters" / "plain")
        real, calls = server.engine.classify, []

        def classify(rows, version):
            calls.append(version.hash)
            if len(calls) == 2:
                server.publish("x", classes / "adapters" / "five")
                server.bank.unload(version)
            return real(rows, version)

        monkeypatch.setattr(server.engine, "classify", classify)
        found = server.classify(["red dog"] * 20, "x")
        assert {one.adapter for one in found} == {hash_of(classes / "adapters" / "five")}
        assert {one.name: one.served for one in server.adapters()} == {"x": 20}


def test_a_client_that_leaves_has_no_more_texts_begun(up, monkeypatch):
    real, calls, gate = up.server.engine.classify, [], threading.Event()

    def classify(rows, version):
        calls.append(len(rows))
        gate.wait(30)
        return real(rows, version)

    monkeypatch.setattr(up.server.engine, "classify", classify)
    body = json.dumps({"model": "plain", "input": ["red dog"] * 400}).encode()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\nContent-Type: application/json\r\n"
    connection = up.connect()
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: calls)
    connection.close()
    text = 'lorakit_http_total{route="/v1/classify",status="499"}'
    until(lambda: text in up.client().get("/metrics").text)
    gate.set()
    until(lambda: idle(up.server))
    answer = up.client().post("/v1/classify", json={"model": "plain", "input": "red dog"})
    assert answer.status_code == 200
    assert calls == [4, 1]


def test_half_a_character_is_no_text(up):
    for inputs in ("\ud800", ["fine", "a\udfffb"], [["fine", "\ud800"]]):
        content = json.dumps({"model": "plain", "input": inputs}).encode()
        answer = up.client().post("/v1/classify", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input")
        assert "lone surrogate" in answer.json()["error"]["message"]


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]])
def test_ids_for_embeddings_are_told_to_be_sent_as_text(up, ids):
    answer = up.client().post("/v1/embeddings", json={"model": "plain", "input": ids})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "send the texts" in answer.json()["error"]["message"]
