"""Without HTTP: lk.Server in process, and a file whose rows name their adapters. With it: `lorakit serve` as a process."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
import runs
import serve_app_kit as kit
from serve_app_kit import API_KEY, expected, grown, hash_of

from lorakit.cli import main
from lorakit.errors import DataError, FileError, QueueFullError, UnknownAdapterError, UsageError, WrongKindError
from lorakit.serve.limits import Limits, SamplingParams
from lorakit.serve.server import Server, ServerConfig

PROMPTS = ["one two", "a red cat", "moon", "dog"]
TOKENS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("process")
    base = kit.save_base(root / "base")
    for seed, name in enumerate(("sql", "fr")):
        grown(base, root / "adapters" / name, seed)
    return root


def answers(place, name, prompts):
    return expected(str(place / "base"), None if name is None else place / "adapters" / name, prompts, TOKENS)


def test_generate_chat_and_submit(place):
    names = ["sql", None, "fr", "sql"]
    with Server(str(place / "base"), place / "adapters") as server:
        found = server.generate(PROMPTS, names, SamplingParams(max_new_tokens=TOKENS))
        assert [one.text for one in found] == [
            answers(place, name, [p])[0] for name, p in zip(names, PROMPTS, strict=True)
        ]
        assert [one.adapter for one in found] == [name and hash_of(place / "adapters" / name) for name in names]
        chat = [{"role": "user", "content": "hello"}]
        assert server.chat(chat, "fr", SamplingParams(max_new_tokens=TOKENS)).text == answers(place, "fr", [chat])[0]
        handle = server.submit(PROMPTS[0], "sql", SamplingParams(max_new_tokens=TOKENS))
        assert server.tokenizer.decode(list(handle)) == answers(place, "sql", PROMPTS[:1])[0]
        assert {one.name: one.served for one in server.adapters()} == {"sql": 3, "fr": 2}
        with pytest.raises(UnknownAdapterError):
            server.generate(["x"], ["nope"])
        with pytest.raises(UsageError, match="an adapter for each"):
            server.generate(["x"], ["sql", "fr"])
        with pytest.raises(DataError, match="empty"):
            server.generate([""])
        with pytest.raises(WrongKindError):
            server.classify(["x"], "sql")
        assert server.generate([]) == []


def test_more_prompts_than_the_queue_takes(place):
    with Server(str(place / "base"), place / "adapters", ServerConfig(limits=Limits(queue=3))) as server:
        prompts = PROMPTS * 4
        found = server.generate(prompts, "fr", SamplingParams(max_new_tokens=TOKENS))
        assert [one.text for one in found] == answers(place, "fr", prompts)
        held = [server.submit("x", None, SamplingParams(max_new_tokens=400, ignore_eos=True)) for _ in range(3)]
        with pytest.raises(QueueFullError):
            server.generate(["x"])
        for one in held:
            one.cancel()


def test_publish_and_roll_back_in_process(place, tmp_path):
    with Server(str(place / "base"), tmp_path / "own", ServerConfig(warm=False)) as server:
        first, second = (server.publish("both", place / "adapters" / name) for name in ("sql", "fr"))
        assert server.generate(["x"], "both")[0].adapter == second == hash_of(place / "adapters" / "fr")
        assert server.roll_back("both") == first
        assert server.generate(["x"], "both")[0].adapter == first
        with pytest.raises(FileError, match=r"another base|does not fit"):
            server.publish("both", kit.adapter_folder(tmp_path / "foreign"))
        with pytest.raises(UsageError, match="base's own name"):
            server.publish("base", place / "adapters" / "sql")
        server.unload("both")
        with pytest.raises(UnknownAdapterError):
            server.generate(["x"], "both")
        assert server.load("both") == first
    with pytest.raises(UsageError, match=r"unknown|no such|expected"):
        Server(str(place / "base"), tmp_path / "own", ServerConfig(task="poetry"))


def test_rows_name_their_adapters(place, tmp_path, capsys):
    names = ["fr", None, "sql", ""]
    rows = [{"prompt": prompt, "who": name} for prompt, name in zip(PROMPTS, names, strict=True)]
    file = runs.write_rows(tmp_path / "rows.jsonl", rows)
    call = ["generate", "--model", str(place / "base"), "--prompts", file, "--adapters", str(place / "adapters")]

    def said(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*call, *map(str, words)])
        return left.value.code or 0, capsys.readouterr()

    code, spoken = said("--adapter-column", "who", "--max-new-tokens", TOKENS, "--json")
    assert code == 0, spoken.err
    found = json.loads(spoken.out)
    for row, prompt, name in zip(found, PROMPTS, names, strict=True):
        wanted = answers(place, name or None, [prompt])[0]
        digest = hash_of(place / "adapters" / name) if name else None
        assert row == {"prompt": prompt, "adapter": name or None, "hash": digest, "answer": wanted}
    for words, message in (
        (["--adapter-column", "whom"], "expected a column 'whom'"),
        ([], "take --adapter-column"),
        (["--adapter-column", "who", "--batch-size", 3], "batch-size"),
        (["--adapter-column", "who", "--no-repeat-ngram-size", 3], "no_repeat_ngram_size"),
    ):
        code, spoken = said(*words)
        assert code == 1
        assert message in spoken.err
    runs.write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "who": "nope"}])
    code, spoken = said("--adapter-column", "who")
    assert code == 1
    assert "there is no adapter 'nope'" in spoken.err


def loaded(client, name):
    """Ask until the adapter is there: a machine may take longer than the server lets a request wait, and says so."""
    began = time.monotonic()
    while True:
        answer = client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
        if answer.status_code != 503 or time.monotonic() - began > 60:
            assert answer.status_code == 200, answer.text
            return
        assert answer.json()["error"]["code"] == "adapter_loading"
        time.sleep(0.2)


@pytest.mark.long
def test_lorakit_serve_answers_and_drains(place):
    """SIGTERM while a stream runs: it is answered to its end, nothing new is taken, the exit code is 0."""
    command = [sys.executable, "-c", "from lorakit.cli import main; main()", "serve", "--base", str(place / "base"),
               "--adapters", str(place / "adapters"), "--port", "0", "--json"]  # fmt: skip
    environment = {**os.environ, "LORAKIT_API_KEYS": API_KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        began = json.loads(process.stdout.readline())
        assert (began["model"], began["adapters"]) == ("base", ["fr", "sql"])
        url = began["url"].removesuffix("/v1")
        body = {"model": "sql", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client:
            loaded(client, "sql")
            with client.stream("POST", "/v1/completions", json=body) as response:
                events = response.iter_lines()
                next(events)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert "stopped" in process.communicate(timeout=60)[1]
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
