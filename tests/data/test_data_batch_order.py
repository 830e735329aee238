"""The orders of batches: every row once, the same everywhere, little padding."""

import itertools
import os
import random
import subprocess
import sys

import pytest

from lorakit.data import BatchOrder
from lorakit.data.batch import TokenOrder
from lorakit.errors import UsageError

LENGTHS = random.Random(7).choices(range(5, 200), k=1003)


def padding(batches):
    positions = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    return 1 - sum(LENGTHS) / positions


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("batch_size", [1, 8, 1003, 5000])
def test_every_row_is_in_one_batch(grouped, batch_size):
    order = BatchOrder(LENGTHS, batch_size, seed=3, group_by_length=grouped)
    for batches in (order.epoch(0), order.epoch(1), order.evaluation()):
        assert sorted(row for batch in batches for row in batch) == list(range(1003))
        assert len(batches) == len(order)
        assert sorted(len(batch) for batch in batches)[1:] == [batch_size] * (len(batches) - 1)


def test_epochs_and_seeds_differ():
    order = BatchOrder(LENGTHS, 8, seed=3)
    assert order.epoch(0) == BatchOrder(LENGTHS, 8, seed=3).epoch(0)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(1) != BatchOrder(LENGTHS, 8, seed=4).epoch(0)
    assert order.epoch(0) != BatchOrder(LENGTHS, 8, seed=4).epoch(0)


def test_no_global_state_and_no_hash_seed_changes_the_order():
    random.seed(1)
    first = BatchOrder(LENGTHS[:100], 8, seed=3).epoch(2)
    random.seed(2)
    code = f"from lorakit.data import BatchOrder; print(BatchOrder({LENGTHS[:100]}, 8, seed=3).epoch(2))"
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(first)


def test_a_small_order_is_fixed_for_good():
    """Written down, so that no later version changes the order of a run that is resumed."""
    assert BatchOrder([5, 1, 9, 3, 7, 2], 2, seed=0).epoch(0) == [[2, 4], [0, 3], [5, 1]]


def test_rows_of_like_length_meet_and_batches_stay_shuffled():
    grouped, plain = BatchOrder(LENGTHS, 8, seed=0), BatchOrder(LENGTHS, 8, seed=0, group_by_length=False)
    assert padding(grouped.epoch(0)) < 0.05 < 0.3 < padding(plain.epoch(0))
    assert padding(grouped.evaluation()) < 0.01
    longest = [max(LENGTHS[row] for row in batch) for batch in grouped.epoch(0)]
    assert sum(longest[:60]) / 60 == pytest.approx(sum(longest) / len(longest), rel=0.15)
    first = grouped.evaluation()[0]
    assert [LENGTHS[row] for row in first] == sorted(LENGTHS, reverse=True)[:8]


def test_batch_size_must_be_positive():
    with pytest.raises(UsageError, match="at least 1"):
        BatchOrder([1], 0, seed=0)


# -- batches of a bounded number of tokens


@pytest.mark.parametrize("budget", [1, 199, 1024, 10**9])
def test_token_batches_hold_every_row_once_and_no_more_than_fits(budget):
    order = TokenOrder(LENGTHS, budget, seed=3)
    for batches in (order.epoch(0), order.epoch(1), order.evaluation()):
        assert sorted(row for batch in batches for row in batch) == list(range(1003))
        assert len(batches) == len(order)
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(LENGTHS[row] for row in batch) <= budget
    if budget < 10**9:
        full = order.evaluation()
        for batch, following in itertools.pairwise(full):  # not one more of the next would have fitted
            assert (len(batch) + 1) * LENGTHS[batch[0]] > budget
            assert LENGTHS[batch[-1]] >= LENGTHS[following[0]]


def test_token_batches_are_drawn_anew_each_epoch_and_hardly_padded():
    order = TokenOrder(LENGTHS, 1024, seed=3)
    assert order.epoch(0) == TokenOrder(LENGTHS, 1024, seed=3).epoch(0)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(1) != TokenOrder(LENGTHS, 1024, seed=4).epoch(1)
    assert {frozenset(batch) for batch in order.epoch(0)} != {frozenset(batch) for batch in order.epoch(1)}
    assert padding(order.epoch(0)) < 0.02
    firsts = [LENGTHS[batch[0]] for batch in order.epoch(0)]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_a_small_token_order_is_fixed_for_good():
    assert TokenOrder([5, 1, 9, 3, 7, 2], 10, seed=0).epoch(0) == [[4], [2], [5, 1], [0, 3]]


def test_batch_tokens_must_be_positive():
    with pytest.raises(UsageError, match="batch_tokens must be at least 1"):
        TokenOrder([1], 0, seed=0)
    assert len(TokenOrder([], 8, seed=0)) == 0
