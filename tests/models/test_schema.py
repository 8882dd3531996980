"""Checks of plain data: what each takes, what it refuses, and where it says that it was."""

import math
import re

import pytest
import torch

from models import schema

TENSORS = schema.mapping(str, schema.tensor)
POINT = schema.record({"x": schema.integer(), "y": schema.number}, required=True)
TAKEN = [
    (schema.integer(0, 3), [0, 3]),
    (schema.number, [0, -1.5, 1e308]),
    (schema.positive, [1, 1e-300]),
    (schema.boolean, [True, False]),
    (schema.text, ["", "a"]),
    (schema.one_of("a", None), ["a", None]),
    (schema.optional(schema.text), ["a", None]),
    (schema.sequence(schema.integer(), length=2), [[1, 2], (1, 2)]),
    (schema.texts(most=2, longest=3, in_all=5), [[], ["abc", "ab"], ("",)]),
    (schema.any_of("a number or text", schema.number, schema.text), [1, "a"]),
    (schema.tensor, [torch.zeros(3), torch.zeros(2, 3).t(), torch.zeros(1).expand(2**26), torch.zeros(0)]),
    (POINT, [{"x": 1, "y": 2.0}, {"x": 1, "y": 2.0, "z": "other"}]),
    (schema.anything, [None, object()]),
]
REFUSED = [
    (schema.integer(0, 3), [-1, 4, 1.0, True, "1", None, 10**400]),
    (schema.number, [math.nan, math.inf, True, "1", None, 10**400, -(10**400), torch.tensor(1.0)]),
    (schema.positive, [0, -1, math.nan]),
    (schema.boolean, [1, 0, "true", None]),
    (schema.text, [1, None, b"a"]),
    (schema.one_of("a", 1, None), ["b", True, ["a"], 1.0]),
    (schema.optional(schema.text), [1]),
    (schema.sequence(schema.integer(), length=2), [[1], [1, 2, 3], "12", {1: 2}, [1, "2"]]),
    (schema.texts(most=2, longest=3, in_all=5), [[""] * 3, ["abcd"], ["abc", "abc"], "ab", ["a", 1], {"a": "b"}]),
    (schema.any_of("a number or text", schema.number, schema.text), [None, [1]]),
    (schema.tensor, [[1], torch.zeros(1).expand(2**27), torch.zeros(3, device="meta"), torch.eye(3).to_sparse()]),
    (TENSORS, [[], {1: torch.zeros(1)}, {"a": 1}]),
    (POINT, [{}, {"x": 1}, {"x": 1, "y": "2"}, []]),
]


@pytest.mark.parametrize(("check", "value"), [(check, value) for check, values in TAKEN for value in values])
def test_taken(check, value):
    check("here", value)


@pytest.mark.filterwarnings("ignore")  # sparse tensors are a beta of torch
@pytest.mark.parametrize(("check", "value"), [(check, value) for check, values in REFUSED for value in values])
def test_refused(check, value):
    with pytest.raises(ValueError, match="here"):
        check("here", value)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (POINT, {"x": 1}, "here.y is missing"),
        (POINT, {"x": "1", "y": 2}, "here.x is '1', not an integer from 0 to 281474976710656"),
        (TENSORS, {"a": 1}, "here.a is 1, not a tensor"),
        (TENSORS, {2: 1}, "a key of here is 2, not of type str"),
        (schema.sequence(schema.text), ["a", 2], "here[1] is 2, not text"),
        (schema.text, torch.zeros(2, 3), "here is a tensor (2, 3), not text"),
        (schema.integer(), "x" * 100, f"here is '{'x' * 39}..., not an integer from 0 to 281474976710656"),
    ],
)
def test_the_message_names_the_place_the_value_and_what_was_wanted(check, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check("here", value)


def test_the_top_of_a_payload_has_no_name():
    with pytest.raises(ValueError, match="^x is missing$"):
        POINT("", {})
    with pytest.raises(ValueError, match="^x is None, not"):
        POINT("", {"x": None, "y": 1})
