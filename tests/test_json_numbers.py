"""The short way for JSON tensors: the same numbers as the long way, or none."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import json_numbers

SAMPLE = (2, 3)
ROW = [[1, 2.5, -3e-3], [0, 7, 2**63]]

numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
rows = st.lists(st.lists(numbers, min_size=2, max_size=3), min_size=2, max_size=2)
values = st.recursive(rows | numbers, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@pytest.mark.parametrize("inputs", [ROW, [ROW], [ROW, ROW, ROW]])
def test_samples_are_read_with_what_stands_beside_them(inputs: list[Any]) -> None:
    body = json.dumps({"a": 1, "inputs": inputs, "b": "[text", "c": 0.5})
    plain = body.replace("[text", "text")

    read = json_numbers.read(plain.encode(), SAMPLE)

    assert read is not None
    np.testing.assert_array_equal(read[0], np.array(inputs, np.float64))
    assert read[1] == {"a": 1, "b": "text", "c": 0.5}
    assert json_numbers.read(body.encode(), SAMPLE) is None  # a bracket too many, for all it knows


@given(values)
def test_just_samples_are_read_and_with_the_numbers_that_they_have(inputs: Any) -> None:
    read = json_numbers.read(json.dumps({"inputs": inputs}).encode(), SAMPLE)

    try:
        array = np.array(inputs, np.float64)
    except ValueError:  # ragged
        array = np.zeros(0)
    if array.shape[-2:] == SAMPLE and array.ndim <= 3:
        assert read is not None
        np.testing.assert_array_equal(read[0], array, strict=True)
    else:
        assert read is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1, 2]",
        b"5",
        b'"inputs"',
        b'{"inputs": 5}',
        b'{"inputs": {"a": [1]}}',
        b'{"inputs": []}',
        b'{"inputs": [[], []]}',
        b'{"inputs": [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4], [5, 6]]]}',  # ragged
        b'{"inputs": [[1, 2, [3]], [4, 5, 6]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, "6"]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, null]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, true]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, 1e999]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, 6]]',
        b'\xef\xbb\xbf{"inputs": [[1, 2, 3], [4, 5, 6]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, 6]], "inputs": [[0, 0, 0], [0, 0, 0]]}',
        b'{"inputs": [[1, 2, 3], [4, 5, 6]], "a": 1, "a": 2}',
        b'{"inputs": [[1, 2, 3], [4, 5, 6]], "a": true}',
        b'{"inputs": [[1, 2, 3], [4, 5, 6]], "a": null}',
        b'{"inputs": [[1, 2, 3], [4, 5, 6]], "a": {"b": 1}}',
        b'{"inputs": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b"{" + b",".join(b'"%d": 1' % i for i in range(100_000)) + b"}",
    ],
)
def test_what_is_not_as_usual_is_left_to_others(body: bytes) -> None:
    assert json_numbers.read(body, SAMPLE) is None
