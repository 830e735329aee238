"""Before the routes: keys, hosts, bodies that are huge or slow, readers that do not read."""

import asyncio
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import serve_app_kit as kit
from serve_app_kit import ADMIN_KEY, API_KEY, listening, until

from lorakit.cli import main
from lorakit.errors import UsageError
from lorakit.serve.guard import Access, Guard
from lorakit.serve.keys import Keys, check_start, is_loopback, make_keys, read_keys
from lorakit.serve.listen import ListenConfig, listen, uvicorn_settings

LIMIT = 10_000


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    base = kit.save_base(root / "base")
    access = {"body_bytes": LIMIT, "body_seconds": 0.5}
    with listening(base, root / "adapters", header_seconds=0.5, **access) as found:
        yield found


def head(path="/v1/completions", key=API_KEY, method="POST", **fields):
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
    ]
    return "\r\n".join(
        [*lines, *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items()), "", ""]
    ).encode()


def read_all(connection):
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


def health(connection):
    connection.sendall(head("/health", method="GET"))
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        part = connection.recv(4096)
        assert part
        answer += part
    assert b" 200 " in answer.splitlines()[0]


def test_keys_open_what_they_are_for(up):
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    for key, status in ((API_KEY, 200), (ADMIN_KEY, 401), ("", 401), (API_KEY[:-1], 401), (API_KEY + "x", 401)):
        answer = up.client(key).post("/v1/completions", json=body)
        assert answer.status_code == status, key
        assert up.client(key).get("/v1/models").status_code == status
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    for key, status in ((API_KEY, 401), (ADMIN_KEY, 200), ("", 401)):
        assert up.client(key).get("/v1/adapters").status_code == status
        assert up.client(key).get("/v1/aliases").status_code == status
    assert {key: up.client(key).get("/metrics").status_code for key in (API_KEY, ADMIN_KEY, "wrong")} == {
        API_KEY: 200, ADMIN_KEY: 200, "wrong": 401
    }  # fmt: skip


@pytest.mark.parametrize("path", ["//v1/adapters", "/v1/adapters/", "/V1/adapters", "/v1/./adapters", "/v1/x/../adapters",
                                  "/v1%2fadapters", "/v1/adapters%2f..", "/v1/models/../adapters"])  # fmt: skip
def test_no_way_around_the_admin_key(up, path):
    for method in ("GET", "POST"):
        connection = up.connect()
        connection.sendall(head(path, method=method, Content_Length=0, Connection="close"))
        answer = read_all(connection)
        status = int(answer.split(b" ", 2)[1])
        assert status in (400, 401, 403, 404, 405, 422)
        assert b'"refused"' not in answer


def test_two_keys_at_once_are_none(up):
    connection = up.connect()
    connection.sendall(
        head("/v1/models", key="wrong", method="GET", authorization=f"Bearer {API_KEY}", Connection="close")
    )
    assert b" 401 " in read_all(connection).splitlines()[0]


def test_bodies_are_bounded(up):
    client = up.client()
    padded = {"model": "base", "prompt": "x", "max_tokens": 1, "user": "u" * (LIMIT - 100)}
    assert client.post("/v1/completions", json=padded).status_code == 200
    padded["user"] = "u" * LIMIT
    answer = client.post("/v1/completions", json=padded)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    answer = client.post("/v1/completions", content=iter([b"x" * 1000] * 30))  # chunked: no length is claimed
    assert answer.status_code == 413
    connection = up.connect()
    connection.sendall(head(Content_Length=10**15) + b"x" * 100)
    assert b" 413 " in read_all(connection).splitlines()[0]


def test_bodies_that_dawdle(up):
    connection = up.connect()
    connection.sendall(head(Content_Length=5000))
    began, answer = time.monotonic(), b""
    connection.settimeout(0.05)
    while not answer and time.monotonic() - began < 20:
        try:
            connection.sendall(b"x")
            answer = connection.recv(4096)
        except TimeoutError:
            continue
    assert b" 408 " in answer.splitlines()[0]


def test_headers_that_dawdle(up):
    connection = up.connect()
    assert read_all(connection) == b""  # closed without a word, after half a second
    kept = up.connect()
    for _ in range(3):  # each on time
        health(kept)
        time.sleep(0.3)
    kept.sendall(b"GET /health HTT")
    assert read_all(kept) == b""


def test_garbage_is_refused(up):
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000):
        connection = up.connect()
        connection.sendall(sent)
        assert b" 200 " not in read_all(connection)
    assert up.client().get("/v1/models").status_code == 200


def test_half_a_body_and_gone(up):
    for _ in range(5):
        connection = up.connect()
        connection.sendall(head(Content_Length=5000) + b"{")
        connection.close()
    until(lambda: kit.idle(up.server))
    assert up.client().get("/v1/models").status_code == 200


def test_a_reader_that_does_not_read():
    sent, noted = [], []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            sent.append("ended")

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    access = Access(make_keys([API_KEY]), send_seconds=0.05)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "headers": [(b"authorization", f"Bearer {API_KEY}".encode())],
    }
    asyncio.run(Guard(app, access, lambda *what: noted.append(what))(scope, receive, send))
    assert sent == ["ended"]
    assert noted[0][:2] == ("(none)", 200)


@contextmanager
def answering(app, **config):
    """uvicorn, as the server runs it, with another app behind the guard."""
    import uvicorn

    guard = Guard(app, Access(make_keys([API_KEY]), send_seconds=0.3), lambda *_: None)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn_settings(guard, ListenConfig(**config)))
        thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
        thread.start()
        try:
            until(lambda: server.started)
            yield server, bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def sends(parts, size):
    """An app that answers with so many parts."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"].endswith("shutdown"):
                    return
        length = str(parts * size).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for left in reversed(range(parts)):
            await send({"type": "http.response.body", "body": b"x" * size, "more_body": left > 0})

    return app


def asked(port, stack, **fields):
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
    connection.sendall(head("/v1/x", method="GET", **fields))
    return connection


PARTS = {"a stream": (1000, 1 << 16), "one that is whole": (1, 64 << 20)}


@pytest.mark.parametrize(
    ("what", "then"), [("a stream", b""), ("one that is whole", b"GET /half"), ("one that is whole", None)]
)
def test_clients_that_do_not_read_are_let_go_of(what, then):
    """Given up by the guard amid a stream; out of time for the next headers; told that the connection is to be closed."""
    with ExitStack() as stack:
        config = {"linger_seconds": 0.2, "header_seconds": 0.5, "connections": 8}
        server, port = stack.enter_context(answering(sends(*PARTS[what]), **config))
        idle = [asked(port, stack, **({"Connection": "close"} if then is None else {})) for _ in range(5)]
        until(lambda: len(server.server_state.connections) == 5)
        time.sleep(0.1)
        for connection in idle:
            connection.sendall(then or b"")
        until(lambda: not server.server_state.connections)
        last = asked(port, stack)
        assert last.recv(12) == b"HTTP/1.1 200"


def test_a_client_that_reads_slowly_gets_the_whole():
    size = 24 << 20
    with ExitStack() as stack:
        _, port = stack.enter_context(answering(sends(1, size), linger_seconds=1.0))
        connection, got, began = asked(port, stack, Connection="close"), 0, time.monotonic()
        while part := connection.recv(1 << 18):
            got += len(part)
            time.sleep(0.03)
        assert got > size
        assert time.monotonic() - began > 2  # longer than one that does not read is given


def test_without_keys_only_this_machine_and_no_admin(tmp_path):
    base = kit.save_base(tmp_path / "base")
    with listening(base, tmp_path / "adapters", api=Keys(), admin=Keys()) as up:
        assert up.client("").get("/v1/models").status_code == 200
        for host in ("localhost", "localhost:80", "127.0.0.1:8000", "[::1]:8000"):
            assert up.client("").get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:80"):  # DNS rebinding
            assert up.client("").get("/v1/models", headers={"Host": host}).status_code == 403
        answer = up.client("").post("/v1/adapters", json={"name": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_closed")


def test_keys_are_compared_whole_and_kept_as_digests():
    keys = make_keys(["first-key-of-two", "second-key-of-two"])
    assert keys.match("first-key-of-two")
    assert keys.match("second-key-of-two")
    for wrong in (
        "",
        "first-key-of-tw",
        "first-key-of-two\x00",
        "ä" * 16,
        "first-key-of-two,second-key-of-two",
        "\udcff",
    ):
        assert not keys.match(wrong)
    assert "first" not in repr(keys)
    assert not Keys().match("")


def test_every_key_is_looked_at(monkeypatch):
    seen = []
    real = __import__("hmac").compare_digest
    monkeypatch.setattr("lorakit.serve.keys.hmac.compare_digest", lambda a, b: seen.append(a) or real(a, b))
    keys = make_keys([f"key-number-{n}-of-four" for n in range(4)])
    for given in ("key-number-0-of-four", "none of them"):
        seen.clear()
        keys.match(given)
        assert len(seen) == 4


def test_reading_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-key-0123456789\n\n")
    keys = read_keys("X", file, {"X": "variable-key-0123456789, another-key-0123456789"})
    for key in ("file-key-0123456789", "variable-key-0123456789", "another-key-0123456789"):
        assert keys.match(key)
    assert not read_keys("X", None, {})
    for content, message in (
        ("short", "at least 16"),
        ("has a space in it long", "at least 16"),
        ("# only\n", "holds none"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=message) as caught:
            read_keys("X", file, {})
        assert "short" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys("X", tmp_path / "none", {})


def test_beyond_this_machine_a_key_is_needed():
    key, other = make_keys([API_KEY]), make_keys([ADMIN_KEY])
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="without a key"):
            check_start(host, Keys(), other)
        check_start(host, key, other)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_start(host, Keys(), Keys())
    with pytest.raises(UsageError, match="stands both"):
        check_start("127.0.0.1", key, key)


def test_serve_refuses_to_start_open(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("LORAKIT_API_KEYS", raising=False)
    with pytest.raises(SystemExit) as left:
        main(["serve", "--base", "nothing-that-is-loaded", "--adapters", str(tmp_path), "--host", "0.0.0.0"])
    assert left.value.code == 1
    assert "without a key" in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path):
    base = kit.save_base(tmp_path / "base")
    from lorakit.serve.server import Server

    with socket.socket() as taken, Server(base, tmp_path / "adapters") as server:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="cannot listen"):
            listen(server, Access(), ListenConfig(port=taken.getsockname()[1]))
        with pytest.raises(UsageError, match="without a key"):
            listen(server, Access(), ListenConfig(host="0.0.0.0", port=0))
