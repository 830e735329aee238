"""Planned against measured peak memory of real training steps, and LoRA's peak over full fine-tuning's.

python bench/plan.py [--batch 4] [--length 128] [--rank 8]: figures go to runs/bench/plan.json. Random weights, float32, CPU;
LoRA on all linear layers. Each measurement is a fresh process: its highest resident memory less what it held before the model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

import torch
from common import finish, table

import lorakit as lk
from lorakit.plan import FULL, SHAPES, plan
from lorakit.train.loss import objective_for

MODELS = ("smollm2-135m", "gpt2")
STEPS = 3
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Have glibc give each large block back when it is freed: resident memory is then what tensors hold. By default it keeps freed
blocks of up to 32 MB on its heap, between which holes stay; what they take depends on the order of sizes, and is told apart."""


def highest() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(name: str, **changes: int) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[name]
    config = AutoConfig.for_model(shape.model_type, **{**shape.config, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def steps(model: torch.nn.Module, method: str, options: argparse.Namespace) -> None:
    """A few whole steps, as lorakit.train makes them: loss, backward, clipping, AdamW."""
    if method != FULL:
        lk.attach(model, lk.LoRA(r=options.rank), name="a", seed=0)
    trained = list(model.parameters()) if method == FULL else lk.parameters(model, "a")
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = model.config.vocab_size
    for _ in range(STEPS):
        ids = torch.randint(0, vocabulary, (options.batch, options.length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        part = objective_for("causal-lm").loss(model, batch)
        (part.total / part.targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(name: str, method: str, options: argparse.Namespace) -> None:
    """In the fresh process: print the bytes."""
    small = {"gpt2": {"n_layer": 1, "n_embd": 24}, "smollm2-135m": {"num_hidden_layers": 1, "hidden_size": 18}}[name]
    steps(build(name, vocab_size=100, **small), method, options)  # what libraries allocate once
    before = highest()
    torch.manual_seed(0)
    steps(build(name), method, options)
    print(json.dumps(highest() - before))


def alone(command: list[str], environment: dict[str, str]) -> int:
    """The bytes that a fresh process prints."""
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    bytes_held: int = json.loads(said.splitlines()[-1])
    return bytes_held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*options.one, options)
        return
    rows, found = [], {}
    for name in MODELS:
        planned = plan(name, lk.LoRA(r=options.rank), batch=options.batch, length=options.length, device="cpu")
        peaks = {}
        for row, method in zip(planned.rows, (FULL, "lora"), strict=True):
            command = [sys.executable, *sys.argv, "--one", name, method]
            assert row.memory is not None
            peak, heap = (alone(command, {**os.environ, **extra}) for extra in (RETURNED, {}))
            peaks[method] = peak
            rows.append([name, row.method, row.memory.peak / 1e6, peak / 1e6, row.memory.peak / peak, heap / 1e6])
            found[f"{name}, {row.method}"] = {"planned": row.memory.peak, "measured": peak, "malloc_default": heap}
        rows.append([name, "LoRA's over full fine-tuning's", "", "", peaks["lora"] / peaks[FULL], ""])
        found[f"{name}, ratio"] = {"measured": peaks["lora"] / peaks[FULL]}
    heads = ["model", "method", "planned, MB", "measured, MB", "ratio", "with glibc's heap as it is, MB"]
    finish("plan", {"peaks": found, "batch": options.batch, "length": options.length}, table(heads, rows))


if __name__ == "__main__":
    main()
