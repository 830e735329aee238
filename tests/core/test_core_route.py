"""Routing plans: which rows of a layer's input take which adapter."""

import copy
import pickle

import pytest
import torch

from lorakit.core.route import Route
from lorakit.errors import AdapterError

CPU = torch.device("cpu")


def groups(route, leading, rows):
    return [(slot, where.tolist()) for slot, where in route.groups(leading, rows, CPU)]


def test_rows_are_multiplied_for_beams_and_tokens():
    route = Route((1, -1, 0))
    assert groups(route, 3, 3) == [(0, [2]), (1, [0])]
    assert groups(route, 3, 6) == [(0, [4, 5]), (1, [0, 1])]  # (3, 2 tokens)
    assert groups(route, 6, 6) == [(0, [4, 5]), (1, [0, 1])]  # two beams, or flattened


def test_one_adapter_for_several_rows_is_one_group_unless_strict():
    assert groups(Route((0, -1, 0)), 3, 3) == [(0, [0, 2])]
    assert groups(Route((0, -1, 0), strict=True), 3, 6) == [(0, [0, 1]), (0, [4, 5])]


@pytest.mark.parametrize(("leading", "rows"), [(4, 4), (2, 2), (1, 3), (1, 6)])
def test_rows_that_do_not_divide_are_an_error(leading, rows):
    with pytest.raises(AdapterError, match=f"given 3 rows, but a layer received {leading}"):
        Route((0, -1, 0)).groups(leading, rows, CPU)


def test_tokens_look_at_all_rows():
    route = Route((0, 0, -1), tokens=True)
    assert groups(route, 1, 3) == [(0, [0, 1])]
    with pytest.raises(AdapterError, match="received 4"):
        route.groups(1, 4, CPU)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda route: pickle.loads(pickle.dumps(route))])
def test_copies_route_alike(copied):
    for fields in ({}, {"strict": True}, {"tokens": True}):
        route = Route((0, -1, 1), **fields)
        assert groups(copied(route), 3, 6) == groups(route, 3, 6)


def test_rows_met_first_in_inference_mode_serve_training():
    route = Route((0, -1))
    with torch.inference_mode():
        route.groups(2, 2, CPU)
    ((_, rows),) = route.groups(2, 2, CPU)
    assert not rows.is_inference()
