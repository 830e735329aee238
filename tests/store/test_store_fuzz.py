"""Hundreds of mutations of a good folder: each loads with equal bits, or is refused with a FileError. Nothing else."""

import random
import resource

import pytest
import tiny
import torch
from safetensors.torch import load_file
from store_kit import CONFIG, EXTRA, TENSORS, good, same, snapshot

import lorakit as lk
from lorakit.errors import FileError

ROUNDS = 150


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    kind = chance.randrange(6)
    at = chance.randrange(len(changed))
    if kind == 0:  # flip bits
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif kind == 1:  # truncate
        del changed[at:]
    elif kind == 2:  # cut out
        del changed[at : at + chance.randint(1, 40)]
    elif kind == 3:  # insert
        changed[at:at] = chance.randbytes(chance.randint(1, 40))
    elif kind == 4:  # overwrite with something that JSON and lengths care about
        word = chance.choice(
            [b"\xff" * 8, b"-1", b"null", b"1e999", b'"', b"}", b"[", b"9" * 30, b"\x00", b"{}", b"true"]
        )
        changed[at : at + len(word)] = word
    else:  # swap two stretches
        other, length = chance.randrange(len(changed)), chance.randint(1, 30)
        first, second = bytes(changed[at : at + length]), bytes(changed[other : other + length])
        changed[at : at + length], changed[other : other + length] = second, first
    return bytes(changed)


def head_first(data: bytes, chance: random.Random) -> bytes:
    """A mutation of the part where most goes wrong: the header."""
    cut = min(len(data), 700)
    return mutated(data[:cut], chance) + data[cut:]


def load_faults(model, folder):
    """The faults with which a load is refused; [] where it went through. Any other exception goes its way."""
    try:
        lk.load(model, folder, name="new")
    except FileError as error:
        return error.faults or [str(error)]
    return []


@pytest.mark.parametrize("hashed", [True, False], ids=["with-hash", "as-peft-writes-it"])
@pytest.mark.parametrize("file", [TENSORS, CONFIG, EXTRA])
def test_mutations_load_equal_or_are_refused(file, hashed, tmp_path):
    folder = good(tmp_path)
    if not hashed:
        if file == EXTRA:
            pytest.skip("there is no such file in PEFT's folder")
        (folder / EXTRA).unlink()
    whole, chance = (folder / file).read_bytes(), random.Random(file)
    reference = {key: tensor.clone() for key, tensor in load_file(folder / TENSORS).items()}
    model = tiny.gpt2()
    before, refusals = snapshot(model), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for round_ in range(ROUNDS):
        mutate = head_first if round_ % 2 else mutated
        data = mutate(whole, chance)
        (folder / file).write_bytes(data)
        verdict = lk.verify(folder, model)
        lk.inspect(folder)
        faults = load_faults(model, folder)
        assert faults == list(verdict.faults), round_
        refusals += bool(faults)
        if not faults:
            if hashed or data == whole:
                lk.save(model, tmp_path / "again", name="new")
                again = load_file(tmp_path / "again" / TENSORS)
                assert again.keys() == reference.keys()
                assert all(torch.equal(again[key], reference[key]) for key in again), round_
            lk.detach(model, "new")
        assert same(before, snapshot(model)), round_
    assert refusals > ROUNDS // 4
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 512 * 1024, f"{grown} KiB more at the peak"
