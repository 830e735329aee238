"""One base, many adapters: what loading, switching, decoding and serving cost, beside PEFT and an engine without adapters.

    python bench/serve.py [--rows load,switch,decode,many,uneven,one] [--rounds 15] [--layers 12] [--adapters 2000]

A Llama of 12 layers, 576 wide, random weights; r = 8 on its 7 projections. Run it with nothing beside it.
  load    ms to load a 4.7 MB adapter (24 layers, 768 wide), by how many are resident; PEFT's load_adapter beside
  switch  us between two of many adapters
  decode  one step of R rows, each with one of N adapters, over the base's own step; strict; through the serving stacks; PEFT
  many    tokens/s of requests drawn from 2,000 adapters, and from 5; by how much each lets the process grow
  uneven  tokens/s of 16 uneven requests, each with its own adapter, and of the same without adapters
  one     tokens/s of requests of one adapter, on its own path and merged by the engine, and of a merged model
"""

import argparse
import mmap
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, interleaved, table

import lorakit as lk
from lorakit.serve.bank import Bank, Version
from lorakit.serve.engine import Engine
from lorakit.serve.limits import Limits, SamplingParams

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXES = ((1, 1), (8, 8), (16, 4), (16, 16))
LIMITS = Limits(running=16, queue=4096, cache_tokens=16384, page_tokens=64, step_tokens=512)
RESIDENT = (0, 100, 1000)
LOADED: dict[str, Any] = {"r": 16, "target_modules": ["q_proj", "v_proj"]}  # 48 layers, 4.7 MB
KEPT = 48 * 2 * 16 * 768 * 4  # bytes of the adapter that is loaded
RESIDENT_PEFT = (1, 32)


class Tokens:
    """In place of a tokenizer: the engine needs one only for texts."""

    eos_token_id, pad_token_id = None, 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


def base(layers: int = 12, width: int = 576) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None,
    ) if width % 9 == 0 else LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8,
        max_position_embeddings=2048, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved(model: Any, folder: Path, seed: int, **fields: Any) -> Path:
    """An adapter of random values on disk."""
    lk.attach(model, lk.LoRA(**({"r": 8, "alpha": 16, "target_modules": TARGETS} | fields)), name="a", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in lk.parameters(model, "a"):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.02)
    lk.save(model, folder, name="a")
    lk.detach(model, "a")
    return folder


def copies(folder: Path, count: int, into: Path) -> list[Path]:
    """Folders of their own with one adapter's files: what is measured does not depend on the values."""
    return [shutil.copytree(folder, into / str(k)) for k in range(count)]


# -- load, switch ----------------------------------------------------------------------------------------------------


def load_row(rounds: int, tmp: Path, _: argparse.Namespace) -> tuple[dict[str, Any], str]:
    folder = saved(base(24, 768), tmp / "load", 0, **LOADED)
    found: dict[str, dict[int, dict[str, float]]] = {"lorakit.load": {}, "bank.load": {}, "PEFT": {}}
    for resident in RESIDENT:
        model = base(24, 768)
        for k in range(resident):
            lk.load(model, folder, name=f"r{k}")
        found["lorakit.load"][resident] = _loads(lambda k, m=model: lk.load(m, folder, name=f"n{k}"), rounds)
        with Bank(base(24, 768), memory=64 << 30) as bank:
            for k in range(resident):
                bank.load(folder, f"r{k}")
            found["bank.load"][resident] = _loads(lambda k, b=bank: b.load(folder, f"n{k}"), rounds)
    for resident in RESIDENT_PEFT:
        model = _peft(base(24, 768), [folder] * resident)
        found["PEFT"][resident] = _loads(lambda k, m=model: m.load_adapter(str(folder), f"n{k}"), min(rounds, 5))
    rows = [
        [side, at, *(1e3 * t for t in times.values())] for side, all_ in found.items() for at, times in all_.items()
    ]
    return found, table(["load, 48 layers, 4.7 MB", "resident", "ms", "fresh memory of that size, ms"], rows)


def switch_row(rounds: int, tmp: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found: dict[str, dict[str, float]] = {}
    for places, layers, width, fields in ((48, 24, 768, LOADED), (7 * options.layers, options.layers, 576, {})):
        found[str(places)] = _switches(
            saved(base(layers, width), tmp / f"switch{places}", 0, **fields), layers, width, rounds
        )
    rows = [[places, side, seconds * 1e6] for places, times in found.items() for side, seconds in times.items()]
    return found, table(["switch between 16, adapted layers", "", "us"], rows)


def _switches(folder: Path, layers: int, width: int, rounds: int) -> dict[str, float]:
    ours = base(layers, width)
    for k in range(16):
        lk.load(ours, folder, name=f"r{k}")
    theirs = _peft(base(layers, width), [folder] * 16)
    turn = iter(range(10**9))
    sides = {
        "lorakit": lambda: lk.use(ours, f"r{next(turn) // 2 % 16}"),
        "PEFT": lambda: theirs.set_adapter(f"r{next(turn) // 2 % 16}"),
    }
    return interleaved(sides, rounds, 16)


def _loads(run: Callable[[int], Any], rounds: int) -> dict[str, float]:
    """Median seconds of a load, and of writing as many bytes as it keeps into memory that no one has used yet, in turns.

    A machine gives memory out at its own price, which may rise as more is held, and each load pays it.
    """
    run(-1)
    times: dict[str, list[float]] = {"load": [], "fresh": []}
    held = []
    for k in range(rounds):
        begin = time.perf_counter()
        run(k)
        between = time.perf_counter()
        held.append(mmap.mmap(-1, KEPT))
        np.frombuffer(held[-1], dtype=np.uint8)[:] = 1
        times["load"].append(between - begin)
        times["fresh"].append(time.perf_counter() - between)
    return {name: statistics.median(values) for name, values in times.items()}


def _peft(model: Any, folders: list[Path]) -> Any:
    from peft import PeftModel

    warnings.filterwarnings("ignore")
    wrapped = PeftModel.from_pretrained(model, str(folders[0]), "r0")
    for k, folder in enumerate(folders[1:], start=1):
        wrapped.load_adapter(str(folder), f"r{k}")
    return wrapped


# -- one decoding step -----------------------------------------------------------------------------------------------


def decode_row(rounds: int, tmp: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    maker = base(options.layers)
    folders = [saved(maker, tmp / f"decode{k}", k) for k in range(16)]
    plain, routed, theirs, served, strict = (base(options.layers) for _ in range(5))
    for k, folder in enumerate(folders):
        lk.load(routed, folder, name=f"r{k}")
    theirs = _peft(theirs, folders)
    found: dict[str, dict[str, float]] = {}
    with (
        Bank(served) as bank,
        Bank(strict) as exact,
        torch.no_grad(),
    ):  # an engine is strict or not: each repeats its steps
        banks = {False: (bank, _held(bank, folders)), True: (exact, _held(exact, folders))}
        for rows, count in MIXES:
            found[f"{rows}/{count}"] = _steps(rows, count, plain, routed, theirs, banks, rounds)
    sides = list(next(iter(found.values())))
    lines = [
        [mix, times["base"] * 1e3, *(f"{100 * (times[side] / times['base'] - 1):+.1f}%" for side in sides[1:])]
        for mix, times in found.items()
    ]
    return found, table(["decode step, rows/adapters", "base ms", *sides[1:]], lines)


def _held(bank: Bank, folders: list[Path]) -> list[Version]:
    versions = [bank.load(folder, f"r{k}") for k, folder in enumerate(folders)]
    for version in versions:
        bank.hold(version)
    return versions


def _steps(
    rows: int,
    count: int,
    plain: Any,
    routed: Any,
    theirs: Any,
    banks: dict[bool, tuple[Bank, list[Version]]],
    rounds: int,
) -> dict[str, float]:
    """Seconds of a step of one token a row, each side."""
    ids = torch.randint(4096, (rows, 1))
    names = [f"r{k % count}" for k in range(rows)]
    for bank, versions in banks.values():
        for version in versions[:count]:
            bank.place(version, {one.id for one in versions})

    def route(strict: bool) -> Callable[[], float]:
        def run() -> float:
            with lk.route(routed, names, strict=strict):
                routed(ids, use_cache=False)  # the first stacks the pairs, as the first step of a mixture does
                begin = time.perf_counter()
                routed(ids, use_cache=False)
                return time.perf_counter() - begin

        return run

    def serve(strict: bool) -> Callable[[], Any]:
        bank, versions = banks[strict]
        index = tuple(versions[k % count].id for k in range(rows))

        def run() -> None:
            bank.live.plain()
            bank.live.spread(index, strict=strict)  # told anew, as each step of an engine is
            bank.model(ids, use_cache=False)

        return run

    sides = {
        "base": lambda: plain(ids, use_cache=False),
        "served": serve(False),
        "served, strict": serve(True),
        "route": route(False),
        "route, strict": route(True),
        "PEFT": lambda: theirs(ids, use_cache=False, adapter_names=names),
    }
    return interleaved(sides, rounds)


# -- the engine ------------------------------------------------------------------------------------------------------


def throughput(engine: Engine, requests: list[tuple[list[int], Version | None, int]]) -> float:
    """Tokens a second, from the first request to the last token."""
    begin = time.perf_counter()
    handles = [
        engine.generate(prompt, version, SamplingParams(max_new_tokens=new, ignore_eos=True))
        for prompt, version, new in requests
    ]
    tokens = sum(len(handle.result().tokens) for handle in handles)
    return tokens / (time.perf_counter() - begin)


def prompts(count: int, new: tuple[int, int], seed: int = 0) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    return [([rng.randrange(4096) for _ in range(rng.randrange(8, 64))], rng.randrange(*new)) for _ in range(count)]


def _process() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def many_row(rounds: int, tmp: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    folder = saved(base(options.layers), tmp / "many", 0)
    work = prompts(48, (24, 48))  # short turns: the machine's speed drifts
    with Bank(base(options.layers), memory=64 << 30) as bank, Engine(bank.model, Tokens(), bank, LIMITS) as engine:
        before, names = _process(), copies(folder, options.adapters, tmp / "copies")
        versions = [bank.load(each, f"a{k}") for k, each in enumerate(names)]
        rng = random.Random(1)
        size = (_process() - before) / len(names) / (folder / "adapter_model.safetensors").stat().st_size

        def side(count: int) -> Callable[[], float]:
            def run() -> float:
                return 1 / throughput(engine, [(prompt, versions[rng.randrange(count)], new) for prompt, new in work])

            return run

        times = interleaved({"5": side(5), str(options.adapters): side(options.adapters)}, rounds, 1)
    rates = {name: 1 / seconds for name, seconds in times.items()}
    share = rates[str(options.adapters)] / rates["5"]
    rows = [[name, rate] for name, rate in rates.items()] + [
        ["share", f"{share:.1%}"],
        ["the process's growth over the file, an adapter", size],
    ]
    return {"tokens_per_second": rates, "memory_over_file": size}, table(["adapters drawn from", "tokens/s"], rows)


def uneven_row(rounds: int, tmp: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    maker = base(options.layers)
    work = prompts(16, (16, 96), seed=2)
    with Bank(base(options.layers)) as bank, Engine(bank.model, Tokens(), bank, LIMITS) as engine:
        versions = [bank.load(saved(maker, tmp / f"uneven{k}", k), f"a{k}") for k in range(16)]
        own = [(prompt, version, new) for (prompt, new), version in zip(work, versions, strict=True)]
        bare = [(prompt, None, new) for prompt, new in work]
        with Bank(base(options.layers)) as none, Engine(none.model, Tokens(), none, LIMITS) as plain:
            times = interleaved(
                {
                    "no adapters": lambda: 1 / throughput(plain, bare),
                    "16 adapters": lambda: 1 / throughput(engine, own),
                },
                max(3, rounds // 3),
                1,
            )
    rates = {name: 1 / seconds for name, seconds in times.items()}
    rows = [[name, rate] for name, rate in rates.items()]
    rows.append(["share", f"{rates['16 adapters'] / rates['no adapters']:.1%}"])
    return {"tokens_per_second": rates}, table(["16 uneven requests", "tokens/s"], rows)


def one_row(rounds: int, tmp: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    folder = saved(base(options.layers), tmp / "one", 0)
    found: dict[str, dict[str, float]] = {}
    for count in (1, 16):
        work = prompts(count, (64, 65), seed=3)
        found[str(count)] = _one(folder, work, rounds, options.layers)
    rows = []
    for count, rates in found.items():
        shares = [rates[side] / rates["merged model"] for side in ("own path", "merged by the engine")]
        rows.append([count, *rates.values(), *(f"{share:.1%}" for share in shares)])
    heads = [
        "requests at once",
        *next(iter(found.values())),
        "own path / merged model",
        "merged by the engine / merged model",
    ]
    return {"tokens_per_second": found}, table(heads, rows)


def _one(folder: Path, work: list[tuple[list[int], int]], rounds: int, layers: int) -> dict[str, float]:
    merged = base(layers)
    lk.load(merged, folder, name="a")
    lk.merge(merged, "a")
    values = {key: value.clone() for key, value in merged.state_dict().items()}
    merged = base(layers)
    merged.load_state_dict(values)
    with (
        Bank(merged) as none, Engine(merged, Tokens(), none, LIMITS) as best,
        Bank(base(layers)) as first, Engine(first.model, Tokens(), first, LIMITS) as own,
        Bank(base(layers)) as second, Engine(second.model, Tokens(), second, LIMITS, merge_after=8) as fast,
    ):  # fmt: skip
        a, b = first.load(folder, "a"), second.load(folder, "a")
        times = interleaved(
            {
                "merged model": lambda: 1 / throughput(best, [(prompt, None, new) for prompt, new in work]),
                "own path": lambda: 1 / throughput(own, [(prompt, a, new) for prompt, new in work]),
                "merged by the engine": lambda: 1 / throughput(fast, [(prompt, b, new) for prompt, new in work]),
            },
            max(3, rounds // 3),
            1,
        )
    return {name: 1 / seconds for name, seconds in times.items()}


ROWS = {
    "load": load_row, "switch": switch_row, "decode": decode_row, "many": many_row, "uneven": uneven_row, "one": one_row,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="which, with commas between")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--adapters", type=int, default=2000, help="of the row `many` (4 MB of memory each)")
    options = parser.parse_args()
    chosen = options.rows.split(",")
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        parser.error(f"unknown rows: {', '.join(unknown)}. There are: {', '.join(ROWS)}.")
    results, texts = {}, []
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results[name], text = ROWS[name](options.rounds, Path(folder), options)
        texts.append(text)
    finish("serve", {"rows": results, "rounds": options.rounds, "layers": options.layers}, "\n\n".join(texts))


if __name__ == "__main__":
    main()
