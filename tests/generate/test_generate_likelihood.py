"""Likelihoods against a loop over single tokens."""

import math

import pytest
import torch

from lorakit.data import Encoded
from lorakit.errors import DataError
from lorakit.generate import mean_nll, perplexity

DECODER = [
    Encoded([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], 1),
    Encoded([20, 21], [20, 21], 2),  # the first token has nothing before it: only one counts
    Encoded(list(range(30, 50)), [-100] * 19 + [49], 3),
]
TWO_PARTS = [Encoded([5, 6, 7, 1], [8, 9, 1], 1), Encoded([5], [9, 9, 9, 9, 1], 2)]


def by_hand(model, rows):
    """Sum over single tokens, one row at a time, in fp64."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                decoder = torch.tensor([[0, *row.labels[:-1]]])
                logits = model(input_ids=ids, decoder_input_ids=decoder).logits[0].double()
                pairs = list(zip(logits, row.labels, strict=True))
            else:
                logits = model(input_ids=ids).logits[0].double()
                pairs = list(zip(logits[:-1], row.labels[1:], strict=True))
        for values, label in pairs:
            if label != -100:
                total -= values.log_softmax(-1)[label].item()
                count += 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_nll_is_the_sum_over_single_tokens(writer, batch_size):
    rows = TWO_PARTS if writer.config.is_encoder_decoder else DECODER
    expected = by_hand(writer, rows)
    writer.train()
    assert mean_nll(writer, rows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert perplexity(writer, rows, batch_size=batch_size) == pytest.approx(math.exp(expected), rel=1e-4)
    assert writer.training


def test_a_uniform_model_has_the_vocabularys_size_as_perplexity(llama):
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    assert perplexity(llama, DECODER) == pytest.approx(258, rel=1e-5)


def test_perplexity_beyond_floats_is_infinite(llama):
    with torch.no_grad():
        llama.lm_head.weight.zero_()
        llama.lm_head.weight[3] = 1e6
        llama.model.norm.weight.fill_(1.0)
        llama.lm_head.weight[4] = -1e6  # whatever the sign of the state's sum, one of the two rules
    assert perplexity(llama, [Encoded([5, 6, 7], [5, 6, 7], 1)]) == math.inf


@pytest.mark.parametrize("rows", [[], [Encoded([5, 6], [5, -100], 1)]])
def test_nothing_to_measure_is_an_error(llama, rows):
    with pytest.raises(DataError, match="Nothing can be measured"):
        mean_nll(llama, rows)
