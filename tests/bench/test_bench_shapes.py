"""Named shapes are the published sizes."""

import pytest
import torch

from lorakit.bench.shapes import SHAPES, build

PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "smollm2-135m": 134_515_008,
    "llama-1b": 1_235_814_400,
    "minilm": 22_713_986,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_the_published_models(name):
    """minilm: all-MiniLM-L6-v2's 22,713,216 and a head of two classes."""
    with torch.device("meta"):
        model = SHAPES[name][1]()
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_the_same_seed_gives_the_same_weights():
    one, same, other = (build("minilm", dtype="float32", device=None, seed=seed).model for seed in (0, 0, 1))
    key = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(one.get_parameter(key), same.get_parameter(key))
    assert not torch.equal(one.get_parameter(key), other.get_parameter(key))
