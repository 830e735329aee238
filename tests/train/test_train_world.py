"""Two processes on the same global batches as one: the same adapter, one writer, stopped and resumed alike."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import runs
import tiny
import yaml

import lorakit as lk
from lorakit.errors import FileError, RecipeError
from lorakit.run.check import check_recipe, check_world
from lorakit.run.recipe import load_recipe
from lorakit.train.world import World

SCRIPT = textwrap.dedent(
    """
    import json, sys, warnings
    warnings.simplefilter("error")
    import torch
    torch.set_num_threads(1)
    import lorakit as lk
    from lorakit.run.listen import Listener
    from lorakit.train.world import World, join

    share, own = World.share, []

    def counted(world, rows):  # without shares the sums would still be right, and the work done twice
        found = share(world, rows)
        own.append([len(found), len(rows)])
        return found

    World.share = counted

    class Stop(Listener):  # only the first process hears rows, so only that one is asked to stop
        def row(self, row, total_steps):
            if row["step"] == 2 and "loss" in row:
                import os, signal
                os.kill(os.getpid(), signal.SIGINT)

    found = {"rank": join().rank}
    for path in sys.argv[1:]:
        if path.endswith("stopped.yaml"):
            first = lk.train(path, listener=Stop())
            found["interrupted"], found["step"] = first.interrupted, first.summary["step"]
            result = lk.train(path, resume=True)
        else:
            result = lk.train(path)
        found[path] = result.summary["steps"]
        found["shares"] = found.get("shares") or list(own)
    print("RESULT" + json.dumps(found), flush=True)
    """
)


def together(paths, size=2):
    """What each process of a world printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, paths)],
            env={**inherited, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        told = [one.communicate(timeout=240) for one in started]
    finally:
        for one in started:
            one.kill()
    assert all(one.returncode == 0 for one in started), "\n".join(err[-3000:] for _, err in told)
    return [json.loads(out.partition("RESULT")[2]) for out, _ in told]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")

    def make(name, **changes):
        texts = {
            "train": runs.write_rows(root / "train.jsonl", runs.text_rows(21, 1)),
            "eval": runs.write_rows(root / "eval.jsonl", runs.text_rows(5, 2)),
        }
        model = root / "llama"
        found = {
            "model": str(model) if model.exists() else runs.save_model(model, tiny.llama),
            "data": texts,
            "method": {"name": "lora", "r": 4, "target_modules": "all-linear"},
            "train": {"batch_size": 5, "lr": 5e-3, "epochs": 1, "schedule": "constant", "accumulate": 1},
            "evaluate": {"samples": 1},
            "generate": {"max_new_tokens": 3},
            "output": str(root / name),
        }
        found["train"] = {**found["train"], **changes}
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(found))
        return path

    return make


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def rows(path):
    return runs.read_rows(Path(path).with_suffix("") / "metrics.jsonl")


def test_two_processes_train_what_one_does(document):
    """21 rows in batches of 5: the last batch has one row, so one process has none; lengths differ, so counts do."""
    whole, stopped = document("whole"), document("stopped")
    one = lk.train(document("one"))
    found = together([whole, stopped])
    assert [process["rank"] for process in found] == [0, 1]
    assert all(process[str(whole)] == process[str(stopped)] == one.summary["steps"] == 5 for process in found)
    assert all(process["interrupted"] and process["step"] == 2 for process in found)
    shares = list(zip(*(process["shares"] for process in found), strict=True))
    assert len(shares) >= 5
    assert all(sum(mine for mine, _ in step) == step[0][1] and max(mine for mine, _ in step) <= 3 for step in shares)
    expected = tensors(one.folder)
    for folder in (whole, stopped):
        for key, value in tensors(folder.with_suffix("")).items():
            assert (value - expected[key]).abs().max() < 2e-5 * max(1.0, float(expected[key].abs().max())), key
    files = [path.with_suffix("") / "adapter" / "adapter_model.safetensors" for path in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    alone = runs.read_rows(one.folder / "metrics.jsonl")
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in alone]  # one writer: each row once
    for mine, theirs in zip(rows(whole), alone, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
    with pytest.raises(FileError, match="written by 2 processes, and these are 1"):
        lk.train(stopped, resume=True)


def test_a_world_of_one_sends_nothing():
    alone = World()
    assert alone.first
    assert alone.sums([2, 0.5]) == [2, 0.5]
    assert alone.any(True)
    assert alone.same({"a": 1}) == {"a": 1}
    assert alone.share([3, 4, 5]) == [3, 4, 5]
    assert [list(World(rank, 2).share([3, 4, 5])) for rank in (0, 1)] == [[3, 5], [4]]


def test_what_several_processes_cannot_do(document):
    recipe = load_recipe(document("kept", prefix_cache=True))
    check_recipe(recipe, own_loss=False)
    check_world(recipe, 1)
    with pytest.raises(RecipeError, match="prefix_cache: true keeps states in one process"):
        check_world(recipe, 2)
