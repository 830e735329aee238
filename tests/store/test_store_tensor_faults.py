"""A bad tensors file: truncated, foreign, malicious. Refused with every fault, nothing executed, nothing half-loaded."""

import json
import pickle
import struct

import pytest
import tiny
import torch
from safetensors.torch import load, save_file
from store_kit import EXTRA, PAIR, PREFIX, TENSORS, edit_tensors, good, header_of, refused, write_header

import lorakit as lk
from lorakit.store import header as reader


@pytest.fixture
def folder(tmp_path):
    made = good(tmp_path / "adapter")
    (made / EXTRA).unlink()
    return made


def test_the_sound_folder_is_sound(folder):
    lk.load(tiny.gpt2(), folder)


def test_no_tensors_file(folder):
    (folder / TENSORS).unlink()
    refused(folder, "adapter_model.safetensors: not there")


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_a_pickle_alone_is_refused_and_not_run(folder, name, tmp_path):
    (folder / TENSORS).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    refused(folder, f"{name}: a pickle")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_by_another_name_is_refused_and_not_run(folder, zipped, tmp_path):
    torch.save({"x": Payload(tmp_path / "owned")}, folder / TENSORS, _use_new_zipfile_serialization=zipped)
    (tmp_path / "owned").unlink(missing_ok=True)
    refused(folder, "a pickle with another ending")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "too few"),
        (b"\x10", "too few"),
        (b"\x00" * 7, "too few"),
        (b"\x00" * 8, "its header is no JSON"),
        (b"<!DOCTYPE html><html>no</html>" * 20, "a web page or a Git LFS pointer"),
        (b"\n  <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS pointer"),
        (struct.pack("<Q", 2**63) + b"{}", "its header claims"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "its header claims"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensor"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 4) + b"null", "no JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "its header is no JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header is no JSON"),
        (struct.pack("<Q", 22) + b'{"__metadata__": null}', "__metadata__"),
    ],
    ids=range(15),
)
def test_what_is_no_safetensors_file(folder, content, fault):
    (folder / TENSORS).write_bytes(content)
    parts = ("__metadata__", "holds no tensor") if fault == "__metadata__" else (fault,)
    refused(folder, *parts)


def test_truncated_anywhere(folder):
    whole = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length - 1, 8 + length, 8 + length + 1, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:size])
        faults = refused(folder, "adapter_model.safetensors")
        assert size > 8 or len(faults) == 1
    (folder / TENSORS).write_bytes(whole)
    lk.load(tiny.gpt2(), folder)


def test_a_sound_file_whose_header_length_begins_like_a_pickle_or_a_page(folder):
    """0x80 begins a pickle, "<" a page and "PK" a zip file; as the low bytes of a length they mean nothing."""
    header, data = header_of(folder)
    for length in (0x480, 0x43C, 0x4B50):
        text = json.dumps(header).encode()
        assert len(text) <= length
        write_header(folder, text.ljust(length), data)
        lk.load(tiny.gpt2(), folder)


def entry(**changes):
    def change(header):
        key = f"{PAIR}.lora_A.weight"
        header[key] = header[key] | changes

    return change


def drop(field):
    def change(header):
        del header[f"{PAIR}.lora_A.weight"][field]

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (entry(data_offsets=[0, 10**9]), "its offsets give it"),
        (entry(data_offsets=[10**12, 10**12 + 512]), "ends at byte"),
        (entry(data_offsets=[-512, 0]), "whole numbers of at least 0"),
        (entry(data_offsets=[512, 0]), "its offsets give it"),
        (entry(data_offsets=[0]), "whole numbers"),
        (entry(data_offsets=["0", "512"]), "whole numbers"),
        (entry(data_offsets=None), "whole numbers"),
        (entry(shape=[4, 31]), "its offsets give it"),
        (entry(shape=[4, -32]), "whole numbers"),
        (entry(shape=[4.0, 32]), "whole numbers"),
        (entry(shape=[True, 128]), "whole numbers"),
        (entry(shape="4"), "whole numbers"),
        (entry(shape=[10**9]), "takes 4000000000"),
        (entry(shape=[10**9, 10**9, 10**9]), "takes"),
        (entry(shape=[2**32, 2**32]), "takes"),
        (entry(shape=[2**61, 2**61, 0], data_offsets=[0, 0]), "beyond all memory"),
        (entry(dtype="F128"), "unknown type F128"),
        (entry(dtype=["F32"]), "unknown type"),
        (entry(dtype=None), "unknown type"),
        (entry(dtype="F\x1b[2J" * 100), "unknown type"),
        (drop("dtype"), "must give dtype, shape and data_offsets"),
        (drop("shape"), "must give dtype"),
        (drop("data_offsets"), "must give dtype"),
        (lambda header: header.update({f"{PAIR}.lora_A.weight": 3}), "must give dtype"),
        (lambda header: header.update({"__metadata__": [1]}), "__metadata__"),
        (lambda header: header.update({"__metadata__": {"a": 1}}), "__metadata__"),
    ],
    ids=range(26),
)
def test_a_header_that_lies(folder, change, fault):
    header, data = header_of(folder)
    change(header)
    write_header(folder, header, data)
    (found,) = refused(folder, fault)
    assert found.isprintable()
    assert len(found) < 400


def test_infinity_is_no_size(folder):
    header, data = header_of(folder)
    entry(shape=[float("inf")])(header)
    write_header(folder, header, data)
    refused(folder, "Infinity is no number of JSON")


def test_every_bad_entry_is_listed(folder):
    header, data = header_of(folder)
    names = [key for key in header if key != "__metadata__"]
    for key in names:
        header[key]["dtype"] = "X"
    write_header(folder, header, data)
    assert len(refused(folder, *names)) == len(names) == 4


def test_overlapping_tensors_gaps_and_trailing_bytes(folder):
    header, data = header_of(folder)
    write_header(folder, header, data + b"hidden")
    refused(folder, "6 bytes after the last tensor belong to none")

    keys = sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    moved = {key: value for key, value in header.items() if key != keys[0]}
    write_header(folder, moved, data)
    refused(folder, "before " + keys[1])

    twins = json.loads(json.dumps(header))
    same_size = [key for key in keys if key.endswith("lora_A.weight")]
    twins[same_size[1]]["data_offsets"] = twins[same_size[0]]["data_offsets"]
    write_header(folder, twins, data)
    refused(folder, "overlaps with", "belong to no")


def test_keys_that_stand_twice(folder):
    header, data = header_of(folder)
    text = json.dumps(header)
    key = f"{PAIR}.lora_A.weight"
    twice = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}" + "}"
    write_header(folder, twice.encode(), data)
    refused(folder, f"{key}: stands twice in the header")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("key", "tensor", "faults"),
    [
        ("transformer.h.0.attn.c_attn.lora_A.weight", random(4, 32), ["expected a key that begins with"]),
        ("base_model.transformer.h.0.attn.c_attn.lora_A.weight", random(4, 32), ["expected a key that begins with"]),
        (PREFIX + "../../etc/passwd", random(2), ["../../etc/passwd: the model has no such parameter"]),
        ("/etc/passwd", random(2), ["/etc/passwd: expected a key"]),
        (PREFIX + "/etc/passwd.lora_A.weight", random(4, 2), ["/etc/passwd: lora_B is missing", "no such module"]),
        (PREFIX + "transformer.h.9.mlp.c_fc.lora_A.weight", random(4, 2), ["lora_B is missing", "no such module"]),
        (PREFIX + "transformer.h.0.nothing.weight", random(2), ["nothing.weight: the model has no such parameter"]),
        (PREFIX + "transformer.ln_f.weight", random(2), ["ln_f.weight: expected [32], got [2]"]),
        (
            PREFIX + "transformer.ln_f.weight",
            torch.ones(32, dtype=torch.int64),
            ["ln_f.weight: expected floating-point"],
        ),
        (PAIR + ".lora_magnitude_vector", random(96), ["does not say use_dora"]),
        (PAIR + ".lora_B.bias", random(96), ["does not say lora_bias"]),
        (PAIR + ".lora_embedding_A", random(4, 32), ["has two tensors for lora_A", "do not fit a Conv1D"]),
        (PAIR + ".lora_A.default.weight", random(4, 32), ["does not read: its effect would be lost"]),
        (PAIR + ".lora_A.weight", random(4, 31), ["32 -> 96 wide"]),
        (PAIR + ".lora_A.weight", random(3, 32), ["has rank 3 and lora_B 4", "rank 3 in the file, 4 by"]),
        (PAIR + ".lora_A.weight", random(4, 32, 1), ["must be matrices"]),
        (PAIR + ".lora_A.weight", torch.ones(4, 32, dtype=torch.int32), ["must hold floating-point numbers"]),
        (PAIR + ".lora_A.weight", torch.empty(0, 32), ["has rank 0 and lora_B 4", "rank 0 in the file"]),
        (PAIR + ".lora_B.weight", random(96, 4) / 0.0, ["lora_B.weight: holds values that are not finite"]),
        (PAIR + ".lora_A.weight", torch.full((4, 32), float("nan")).bfloat16(), ["not finite"]),
        (PREFIX + "x\x1b[2J", random(2), ["cannot be printed"]),
    ],
    ids=range(21),
)
def test_tensors_that_do_not_belong(folder, key, tensor, faults):
    edit_tensors(folder, add={key: tensor})
    refused(folder, *faults)


@pytest.mark.parametrize("half", "AB")
def test_half_a_pair(folder, half):
    edit_tensors(folder, drop=[f"{PAIR}.lora_{half}.weight"])
    refused(folder, f"transformer.h.0.attn.c_attn: lora_{half} is missing")


def test_a_module_too_few_and_another_fault_are_told_together(folder):
    edit_tensors(
        folder,
        drop=[f"{PAIR}.lora_A.weight", f"{PAIR}.lora_B.weight"],
        add={PREFIX + "transformer.h.1.attn.c_attn.lora_B.weight": random(96, 4) * float("inf"), "x": random(1)},
    )
    refused(folder, "h.0.attn.c_attn: named by target_modules", "not finite", "x: expected a key")


def test_one_value_that_is_not_finite_is_found_among_many_and_named_alone(folder):
    tensors = edit_tensors(folder)
    key = PREFIX + "transformer.h.1.attn.c_attn.lora_B.weight"
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = tensors[key].clone()
        bad[5, 2] = value
        edit_tensors(folder, add={key: bad})
        assert refused(folder, "not finite") == [f"{key}: holds values that are not finite (NaN or infinity)"]


def test_large_finite_values_are_sound(folder):
    edit_tensors(folder, add={PAIR + ".lora_A.weight": torch.full((4, 32), torch.finfo(torch.float32).max)})
    lk.load(tiny.gpt2(), folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_tensors_are_read(folder, dtype):
    edit_tensors(folder, add={PAIR + ".lora_A.weight": random(4, 32).to(dtype)})
    model = tiny.gpt2()
    lk.load(model, folder)
    lk.save(model, folder / "again")
    assert edit_tensors(folder / "again")[PAIR + ".lora_A.weight"].dtype == dtype


def test_two_names_for_one_parameter(folder):
    bias = random(96)
    edit_tensors(folder, add={PAIR + ".base_layer.bias": bias, PAIR + ".bias": bias.clone()})
    lk.load(tiny.gpt2(), folder)
    edit_tensors(folder, add={PAIR + ".bias": bias + 1})
    refused(folder, "c_attn.bias: has two tensors, which differ")


def test_an_embeddings_pair_on_a_linear_layer_and_the_other_way_round(tmp_path):
    folder = good(tmp_path, target_modules=["wte"])
    tensors = edit_tensors(folder)
    wte = PREFIX + "transformer.wte"
    save_file(
        {
            f"{wte}.lora_A.weight": tensors[f"{wte}.lora_embedding_A"].clone(),
            f"{wte}.lora_B.weight": tensors[f"{wte}.lora_embedding_B"].clone(),
        },
        folder / TENSORS,
    )
    refused(folder, "transformer.wte: the file's tensors do not fit a Embedding")


def test_a_folder_in_place_of_a_file(folder):
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()
    refused(folder, "adapter_model.safetensors: not there")


def test_every_type_is_read_as_safetensors_reads_it(tmp_path):
    """Empty tensors and scalars too, and a header whose length is no multiple of what a type is wide."""
    kinds = {str(kind).removeprefix("torch."): kind for kind in reader.TYPES.values()}
    whole = {name: torch.arange(-3, 9).to(kind).view(3, 4) for name, kind in kinds.items()}
    whole |= {"empty": torch.empty(0, 5), "scalar": torch.tensor(2.5), "bytes": torch.arange(3, dtype=torch.uint8)}
    save_file(whole, tmp_path / "all.safetensors")
    expected = load((tmp_path / "all.safetensors").read_bytes())
    raw = (tmp_path / "all.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    odd = struct.pack("<Q", length + 3) + raw[8 : 8 + length] + b"   " + raw[8 + length :]
    for content in (raw, odd):
        (tmp_path / "all.safetensors").write_bytes(content)
        came, faults = reader.read_tensors(tmp_path / "all.safetensors")
        assert faults == []
        assert list(came) == sorted(expected)
        for name, tensor in expected.items():
            assert came[name].dtype == tensor.dtype
            assert came[name].shape == tensor.shape
            assert torch.equal(came[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
