"""attach, switch and disable against PEFT on 48 layers of GPT-2 small's width, and what one adapted layer costs a call.

python bench/attach.py [--rounds 21] [--layers 48]: sides run in turns; medians and ratios go to runs/bench/attach.json.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finish, interleaved, table
from torch import nn

import lorakit as lk

WIDTH, RANK = 576, 8
SIZES = {16: 100, 1024: 10}  # tokens in a call -> calls in a measurement: a decode step, and a training batch
NAMES = ("first", "second")


def stack(layers: int) -> nn.Module:
    """GPT-2 of `layers` blocks in GPT-2 small's shape (a small vocabulary: the embeddings take no part)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_layer=layers, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


def with_peft(model: nn.Module, target: list[str], names: tuple[str, ...] = NAMES, conv: bool = False) -> Any:
    """The model wrapped by PEFT, with adapters of the same shape as ours."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=target, fan_in_fan_out=conv)
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped


def life(layers: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Rows of the first table: attach (and take off again), switch between two adapters, off and on."""
    lora = lk.LoRA(r=RANK, alpha=16, target_modules=["c_attn"])
    bare, bare_peft, ours = stack(layers), stack(layers), stack(layers)
    for name in NAMES:
        lk.attach(ours, lora, name=name)
    theirs = with_peft(stack(layers), ["c_attn"], conv=True)
    turn, turn_peft = itertools.cycle(NAMES), itertools.cycle(NAMES)

    def attach(both: bool = False) -> float:
        begin = time.perf_counter()
        lk.attach(bare, lora, name=NAMES[0])
        attached = time.perf_counter()
        lk.detach(bare, NAMES[0])
        return (time.perf_counter() if both else attached) - begin

    def attach_peft(both: bool = False) -> float:
        begin = time.perf_counter()
        wrapped = with_peft(bare_peft, ["c_attn"], NAMES[:1], conv=True)
        attached = time.perf_counter()
        wrapped.unload()
        return (time.perf_counter() if both else attached) - begin

    def disable() -> None:
        with lk.use(ours, None):
            pass

    def disable_peft() -> None:
        with theirs.disable_adapter():
            pass

    return {
        "attach": {"lorakit": attach, "peft": attach_peft},
        "attach and detach": {"lorakit": lambda: attach(True), "peft": lambda: attach_peft(True)},
        "switch": {
            "lorakit": lambda: lk.use(ours, next(turn)),
            "peft": lambda: theirs.set_adapter(next(turn_peft)),
        },
        "off and on": {"lorakit": disable, "peft": disable_peft},
    }


def adapted_linear(off: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    lk.attach(model, lk.LoRA(r=RANK, alpha=16), name=NAMES[0])
    if off:
        lk.use(model, None)
    return model


def calls(tokens: int, repeats: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Rows of the second table: one linear layer, plain, adapted but off, with one adapter, and PEFT's."""
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    theirs = with_peft(nn.Sequential(nn.Linear(WIDTH, WIDTH)), ["0"], NAMES[:1])
    theirs_off = with_peft(nn.Sequential(nn.Linear(WIDTH, WIDTH)), ["0"], NAMES[:1])
    theirs_off.base_model.disable_adapter_layers()
    leaves = {
        "plain": plain[0],
        "off": adapted_linear(off=True)[0],
        "lorakit": adapted_linear()[0],
        "peft off": theirs_off.base_model.model[0],
        "peft": theirs.base_model.model[0],
    }
    x = torch.randn(1, tokens, WIDTH)
    recorded = x.clone().requires_grad_(True)

    def infer(leaf: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(repeats):
                    leaf(x)

        return run

    def train(leaf: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(repeats):
                leaf(recorded).sum().backward()

        return run

    return {
        f"{tokens} tokens, no_grad": {name: infer(leaf) for name, leaf in leaves.items()},
        f"{tokens} tokens, forward and backward": {name: train(leaf) for name, leaf in leaves.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, default=48)
    options = parser.parse_args()
    torch.manual_seed(0)
    life_times = {row: interleaved(sides, options.rounds) for row, sides in life(options.layers).items()}
    call_times = {}
    for tokens, repeats in SIZES.items():
        for row, sides in calls(tokens, repeats).items():
            measured = interleaved(sides, options.rounds)
            call_times[row] = {side: seconds / repeats for side, seconds in measured.items()}
    above = [
        [row, times["lorakit"] * 1e3, times["peft"] * 1e3, times["peft"] / times["lorakit"]]
        for row, times in life_times.items()
    ]
    sides = next(iter(call_times.values()))
    below = [
        [row, *(times[side] * 1e6 for side in sides), times["lorakit"] / times["plain"], times["peft"] / times["plain"]]
        for row, times in call_times.items()
    ]
    text = table([f"{options.layers} layers", "lorakit ms", "PEFT ms", "PEFT / lorakit"], above)
    heads = [f"{side}, us a call" for side in sides]
    text += "\n\n" + table([f"one linear layer, {WIDTH} x {WIDTH}", *heads, "lorakit / plain", "PEFT / plain"], below)
    finish("attach", {"life_seconds": life_times, "seconds_per_call": call_times, "rounds": options.rounds}, text)


if __name__ == "__main__":
    main()
