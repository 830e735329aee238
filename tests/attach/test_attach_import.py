"""What `import lorakit` costs, and that rooms do not stand where verbs do."""

import subprocess
import sys

import pytest


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_brings_in_nothing_heavy():
    heavy = "torch", "transformers", "numpy", "datasets", "safetensors", "accelerate", "matplotlib"
    assert run(f"import lorakit, sys; print(*[name for name in {heavy!r} if name in sys.modules])") == []


def test_attach_brings_in_torch_alone():
    heavy = "transformers", "datasets", "accelerate", "safetensors", "matplotlib", "peft"
    assert run(f"import lorakit, sys; lorakit.attach; print(*[n for n in {heavy!r} if n in sys.modules])") == []


@pytest.mark.parametrize(
    "imports",
    [
        "import lorakit.attach.host, lorakit.train.loop",
        "import lorakit.attach, lorakit.train",
        "import lorakit; lorakit.attach; lorakit.train; import lorakit.attach.api, lorakit.run.train",
        "from lorakit.attach import host; from lorakit.train import loop; import lorakit",
    ],
)
def test_verbs_stay_verbs(imports):
    code = f"{imports}; from lorakit import attach, train; print(attach is lorakit.attach, train is lorakit.train, "
    assert run(code + "type(attach).__name__, type(train).__name__)") == ["True", "True", "function", "function"]


def test_every_public_name_resolves_and_others_do_not():
    code = "import lorakit; print(all(callable(getattr(lorakit, n)) for n in lorakit.__all__), hasattr(lorakit, 'no'))"
    assert run(code) == ["True", "False"]
