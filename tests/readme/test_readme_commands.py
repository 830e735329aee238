"""README and docs are run as printed; the demo in a clone; the wheel in an empty environment. Minutes: `make test-long`."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.long


def run(command, folder, timeout=1200, **environment):
    """A shell command, as a user types it; its output is shown where it fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A clean clone of what is committed, in which `make demo` has been run."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is nothing to clone")
    folder = tmp_path_factory.mktemp("clone") / "lorakit"
    run(f"git clone --quiet {ROOT} {folder}", ROOT)
    run("make demo", folder, VIRTUAL_ENV="")
    return folder


@pytest.fixture(scope="session")
def path_of_clone(clone):
    """PATH with the clone's environment first: what the README's reader has after `make`."""
    return f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"


def test_the_demo_keeps_its_promises(clone):
    summary = json.loads((clone / "runs" / "demo" / "summary.json").read_text())
    adapted, base = summary["adapted"]["execution_accuracy"], summary["base"]["execution_accuracy"]
    assert adapted >= 0.75
    assert adapted >= base + 0.3
    assert summary["merged"]["execution_accuracy"] == pytest.approx(adapted, abs=0.02)
    assert summary["merged"]["max_logit_difference"] < 1e-2
    assert summary["trainable_parameters"] <= 0.02 * summary["total_parameters"]
    assert summary["adapter_bytes"] < 0.03 * summary["model_bytes"]
    assert summary["peak_memory_bytes"] < 4e9
    assert "<html" in (clone / "runs" / "demo" / "report.html").read_text()


def test_readme_commands_run_as_printed(clone, path_of_clone):
    rows = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(12)]
    for name in ("my.jsonl", "my-dev.jsonl"):
        (clone / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    make, commands = blocks(ROOT / "README.md", "bash")
    assert make.split("\n")[:2] == ["make demo", "make test"]  # the first has run; the second runs beside this one
    for command in commands.strip().splitlines():
        run(command, clone, PATH=path_of_clone)
    assert (clone / "merged" / "config.json").is_file()
    assert (clone / "runs" / "prompt-completion" / "report.html").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/from-peft.md", "docs/combine.md"])
def test_python_snippets_run_as_printed(clone, path_of_clone, page, tmp_path):
    snippets = blocks(ROOT / page, "python")
    assert snippets
    for number, snippet in enumerate(snippets):
        file = tmp_path / f"snippet{number}.py"
        file.write_text(snippet)
        run(f"python {file}", tmp_path, PATH=path_of_clone)


def test_commands_of_the_docs_run(clone, path_of_clone):
    shutil.copytree(clone / "runs" / "demo" / "adapter", clone / "my-adapter", dirs_exist_ok=True)
    for command in "\n".join(blocks(ROOT / "docs" / "formats.md", "bash")).strip().splitlines():
        run(command, clone, PATH=path_of_clone)


def test_the_wheel_works_in_an_empty_environment(tmp_path):
    """Built, installed without the source beside it, and used."""
    run(f"{sys.executable} -m pip wheel --quiet --no-deps --wheel-dir {tmp_path} {ROOT}", tmp_path)
    (wheel,) = tmp_path.glob("lorakit-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    gpu = shutil.which("nvidia-smi") is not None
    constraint = "" if gpu else f"--constraint {ROOT / 'constraints-cpu.txt'}"
    run(f"{python} -m pip install --quiet {constraint} {wheel}", tmp_path)
    lorakit = tmp_path / "env" / "bin" / "lorakit"
    rows = ["text,label"] + [f"{'good' if n % 2 else 'bad'} film {n},{'yes' if n % 2 else 'no'}" for n in range(16)]
    (tmp_path / "films.csv").write_text("\n".join(rows) + "\n")
    recipe = {
        "model": "minilm-l6",
        "task": "sequence-classification",
        "data": {"train": "films.csv", "eval": "films.csv"},
        "train": {"epochs": 1},
        "output": "run",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    trained = run(f"{lorakit} train recipe.yaml --json", tmp_path)
    assert json.loads(trained.stdout)["trainable_parameters"] > 0
    measured = run(f"{lorakit} evaluate run --json", tmp_path)
    assert set(json.loads(measured.stdout)["metrics"]) == {"accuracy", "f1"}
    assert "lorakit" in run(f"{lorakit} --help", tmp_path).stdout
