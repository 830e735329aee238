"""Publishing, rolling back, taking out of service, over HTTP and under load; the parts that stand alone."""

import random
import shutil
import threading

import httpx
import pytest
import runs
import serve_app_kit as kit
from serve_app_kit import expected, grown, hash_of, idle, listening, until

from lorakit.serve.follow import TextStream
from lorakit.serve.metrics import OTHER, Labels

TOKENS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("admin")
    base = kit.save_base(root / "base")
    for seed in range(3):
        grown(base, root / "made" / str(seed), seed)
    kit.adapter_folder(root / "foreign")
    return root


@pytest.fixture
def up(place, tmp_path):
    with listening(str(place / "base"), tmp_path / "adapters") as found:
        yield found


def put(up, place, number, name):
    """An operator copies a folder into the registry's."""
    target = up.server.registry.folder / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place / "made" / str(number), target)


def ask(up, model, prompt="one two"):
    return up.client().post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": TOKENS})


def test_the_life_of_a_name(up, place):
    admin, hashes = up.admin(), [hash_of(place / "made" / str(number)) for number in range(3)]
    texts = [expected(str(place / "base"), place / "made" / str(n), ["one two"], TOKENS)[0] for n in range(3)]
    put(up, place, 0, "sql")
    answer = admin.post("/v1/adapters", json={"name": "sql"})
    assert answer.status_code == 201
    assert answer.json()["hash"] == hashes[0]
    assert (answer.json()["rank"], answer.json()["state"]) == (4, "ready")
    assert ask(up, "sql").json()["choices"][0]["text"] == texts[0]
    put(up, place, 1, "drop")
    assert admin.post("/v1/adapters", json={"name": "sql", "folder": "drop"}).json()["hash"] == hashes[1]
    assert ask(up, "sql").json()["choices"][0]["text"] == texts[1]
    assert ask(up, f"sql@{hashes[0][7:17]}").json()["choices"][0]["text"] == texts[0]
    assert admin.post("/v1/adapters/sql/rollback").json()["hash"] == hashes[0]
    assert ask(up, "sql").headers["x-lorakit-adapter"] == hashes[0]
    assert admin.post("/v1/adapters/sql/rollback").status_code == 400
    assert admin.post("/v1/adapters/sql/rollback", json={"version": hashes[1][:19]}).json()["hash"] == hashes[1]
    assert admin.put("/v1/aliases/prod", json={"target": "sql"}).json() == {"alias": "prod", "target": "sql"}
    assert ask(up, "prod").json()["adapter"] == hashes[1]
    assert admin.post("/v1/adapters/sql/pin").json()["pinned"] is True
    assert next(one for one in up.server.bank.resident() if one.version.hash == hashes[1]).pinned
    assert admin.post("/v1/adapters/sql/unpin").json()["pinned"] is False
    one = admin.get("/v1/adapters/sql").json()
    assert [event["action"] for event in one["history"]] == ["publish", "publish", "roll back", "roll back"]
    assert one["served"] >= 2
    assert one["aliases"] == ["prod"]
    assert admin.post("/v1/adapters/sql/unload").json()["state"] == "unloaded"
    for model in ("sql", "prod"):
        assert ask(up, model).status_code == 404
    assert up.client().get("/v1/models").json()["data"][1:] == []
    assert admin.post("/v1/adapters/sql/load").json()["state"] == "ready"
    assert ask(up, "prod").json()["choices"][0]["text"] == texts[1]
    assert admin.delete("/v1/aliases/prod").json()["deleted"] is True
    assert ask(up, "prod").status_code == 404
    until(lambda: idle(up.server))


def test_a_version_changes_under_a_running_answer(up, place):
    base, prompt = str(place / "base"), "moon"
    up.server.publish("sql", place / "made" / "0")
    with up.client().stream(
        "POST",
        "/v1/completions",
        json={"model": "sql", "prompt": prompt, "max_tokens": 200, "ignore_eos": True, "stream": True},
    ) as response:
        lines = response.iter_lines()
        next(lines)
        for number in (1, 2):  # the first version is let go of while it answers
            up.server.publish("sql", place / "made" / str(number))
        assert (
            ask(up, "sql", prompt).json()["choices"][0]["text"]
            == (expected(base, place / "made" / "2", [prompt], TOKENS)[0])
        )
        list(lines)
        assert response.headers["x-lorakit-adapter"] == hash_of(place / "made" / "0")
    until(lambda: idle(up.server))
    assert {one.version.hash for one in up.server.bank.resident()} == {hash_of(place / "made" / n) for n in "12"}


def test_what_does_not_fit_changes_nothing(up, place):
    admin = up.admin()
    put(up, place, 0, "sql")
    admin.post("/v1/adapters", json={"name": "sql"})
    before = up.server.registry.entries()
    shutil.copytree(place / "foreign", up.server.registry.folder / "foreign")
    shutil.copytree(place / "made" / "1", up.server.registry.folder / "cut")
    tensors = up.server.registry.folder / "cut" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    for folder in ("foreign", "cut", "none", "..", "../made/1", "/etc", str(place / "made" / "1"), "."):
        answer = admin.post("/v1/adapters", json={"name": "sql", "folder": folder})
        assert answer.status_code == 400, folder
    for name in ("../x", "a/b", "", "x" * 100, "base", "a\nb"):
        assert admin.post("/v1/adapters", json={"name": name, "folder": "sql"}).status_code == 400, name
    for path in ("..%2f..%2fetc", "nope", "%00", "a%0d%0ab"):
        for verb in ("load", "unload", "pin", "rollback"):
            answer = admin.post(f"/v1/adapters/{path}/{verb}")
            assert answer.status_code in (400, 404)
    assert admin.post("/v1/adapters/sql/explode").status_code == 400
    assert admin.put("/v1/aliases/base", json={"target": "sql"}).status_code == 400
    assert admin.put("/v1/aliases/a%2fb", json={"target": "sql"}).status_code in (400, 404)
    assert admin.put("/v1/aliases/a", json={"target": "nope"}).status_code == 404
    assert up.server.registry.entries() == before
    assert len(list((up.server.registry.folder / ".versions").iterdir())) == 1
    assert ask(up, "sql").status_code == 200


def test_logs_hold_no_lines_of_strangers(up, caplog):
    evil = "x\nERROR forged line\r\n\x1b[31m"
    for _ in range(2):
        ask(up, evil)
        up.client().get("/v1/models/x%0aERROR%20forged%20line")
        up.admin().post("/v1/adapters", json={"name": evil, "folder": evil})
    (up.server.registry.folder / "evil\nERROR forged line").mkdir()
    assert not any("\nERROR" in record.getMessage() or "\x1b" in record.getMessage() for record in caplog.records)


def test_a_restart_finds_what_there_was(up, place):
    put(up, place, 0, "sql")
    up.admin().post("/v1/adapters", json={"name": "sql"})
    put(up, place, 1, "sql")
    up.admin().post("/v1/adapters", json={"name": "sql"})
    up.admin().post("/v1/adapters/sql/rollback")
    up.admin().post("/v1/adapters/sql/pin")
    with listening(str(place / "base"), up.server.registry.folder) as again:
        until(lambda: again.server.warmed)
        (one,) = again.admin().get("/v1/adapters").json()["data"]
        assert (one["hash"], one["pinned"], one["state"]) == (hash_of(place / "made" / "0"), True, "ready")
        assert next(iter(again.server.bank.resident())).pinned


def test_the_event_loop_reads_no_registry(up, place, monkeypatch):
    put(up, place, 0, "sql")
    admin, registry, threads = up.admin(), up.server.registry, set()
    for name in ("entries", "aliases", "resolve"):
        real = getattr(registry, name)
        monkeypatch.setattr(
            registry, name, lambda *words, real=real: threads.add(threading.current_thread()) or real(*words)
        )
    assert admin.post("/v1/adapters", json={"name": "sql"}).status_code == 201
    assert admin.put("/v1/aliases/prod", json={"target": "sql"}).json() == {"alias": "prod", "target": "sql"}
    assert admin.get("/v1/aliases").json()["data"] == {"prod": "sql"}
    assert len(admin.get("/v1/adapters/sql").json()["history"]) == 1
    assert admin.get("/v1/adapters/nope").status_code == 404
    assert ask(up, "sql").status_code == 200
    assert threads
    assert {one.name.rpartition("_")[0] for one in threads} <= {"asyncio", "lorakit-http"}


def test_pin_and_unpin_of_a_name_out_of_service(up, place):
    up.server.publish("sql", place / "made" / "0")
    admin = up.admin()
    admin.post("/v1/adapters/sql/unload")
    for verb, pinned in (("pin", True), ("unpin", False), ("pin", True)):
        answer = admin.post(f"/v1/adapters/sql/{verb}")
        assert answer.status_code == 200, answer.text
        assert (answer.json()["pinned"], answer.json()["state"]) == (pinned, "unloaded")
    assert admin.post("/v1/adapters/sql/load").json()["pinned"] is True
    assert next(iter(up.server.bank.resident())).pinned


def test_unforeseen_faults_tell_nothing(up, monkeypatch, caplog):
    def fail():
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(up.server, "adapters", fail)
    answer = up.admin().get("/v1/adapters")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert any("a request failed" in record.message for record in caplog.records)
    with pytest.raises(httpx.HTTPStatusError):
        answer.raise_for_status()


# -- parts


def test_labels_are_bounded():
    labels = Labels(3)
    assert [labels.of(name) for name in "abcdab"] == ["a", "b", "c", OTHER, "a", "b"]
    assert labels.of(None) == "(base)"


class Bytes:
    """A tokenizer of single bytes: characters come in pieces."""

    def decode(self, ids, **settings):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("stop", [(), ("ß€",), ("END", "E€N"), ("x" * 30,)])
def test_streamed_text_is_the_whole_text(stop):
    draw = random.Random(len(stop))
    for _ in range(200):
        text = "".join(draw.choice(["a", "ß", "€", "E", "N", "D", "𝄞", "x", " "]) for _ in range(draw.randint(0, 40)))
        ids = list(text.encode())
        ends = [text.find(one) for one in stop if one in text]
        whole = text[: min(ends)] if ends else text
        stream, parts = TextStream(Bytes(), stop), []
        while ids:
            count = draw.randint(1, 6)
            parts.append(stream.push(ids[:count]))
            ids = ids[count:]
            assert whole.startswith("".join(parts))
        parts.append(stream.finish(whole))
        assert "".join(parts) == whole


def test_streamed_text_of_a_real_tokenizer(tmp_path):
    from lorakit.models import load

    tokenizer = load(runs.save_model(tmp_path, kit.tiny.llama)).tokenizer
    ids = tokenizer("a red cat on the moon")["input_ids"]
    stream = TextStream(tokenizer, ())
    parts = [stream.push([one]) for one in ids]
    assert "".join(parts) == "a red cat on the moon" == tokenizer.decode(ids, skip_special_tokens=True)
