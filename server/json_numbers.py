"""JSON bodies whose `inputs` become an array without a Python object for each number.

For what is as usual only: whatever is not goes the long way (server.inputs), which has the words
for what is wrong with it.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from math import prod
from operator import mul
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

# A parser keeps several times the room of the largest body that it has read. One is kept for small
# ones, so that the room is not taken anew for each.
_KEPT = simdjson.Parser()
_SMALL_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # simdjson passes it over; JSON has none
_BRACKET = np.uint8(ord("["))
# Each name is looked for from the first on.
_MOST_NAMES = 16


def read(body: bytes, sample: tuple[int, ...]) -> tuple[NDArray[np.float64], dict[str, Any]] | None:
    """Return `inputs` as (n, *sample) or one (*sample), and the numbers and texts beside it.

    None for everything else, broken or not.
    """
    if body.startswith(_BYTE_ORDER_MARK):
        return None
    try:
        parser = _KEPT if len(body) <= _SMALL_BYTES else simdjson.Parser()
        found = parser.parse(body)
        if not isinstance(found, simdjson.Object) or len(found) > _MOST_NAMES:
            return None
        values: Any = found["inputs"]
        given: dict[str, Any] = {name: found[name] for name in found if name != "inputs"}
        # A name came twice, or one has more than a number or a text.
        if len(found) != 1 + len(given) or not {*map(type, given.values())} <= {int, float, str}:
            return None
        numbers = np.frombuffer(values.as_buffer(of_type="d"), np.float64)
        brackets = np.count_nonzero(np.frombuffer(body, np.uint8) == _BRACKET)
        for shape in ((len(numbers) // prod(sample), *sample), sample):
            if brackets == _arrays(shape) and _is_shaped(values, shape):
                return numbers.reshape(shape), given
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        pass  # not JSON, or not of numbers alone; or another thread is reading with the parser
    return None


def _is_shaped(values: Any, shape: Sequence[int]) -> bool:  # noqa: ANN401  simdjson's array
    """Return whether nested arrays have these sizes. Deeper ones may be in the last of them."""
    level: Iterable[Any] = (values,)
    for size in shape[:-1]:
        level = [*level]
        if {*map(len, level)} != {size}:
            return False
        level = chain.from_iterable(level)
    return {*map(len, level)} == {shape[-1]}


@lru_cache(maxsize=64)
def _arrays(shape: tuple[int, ...]) -> int:
    """Return how many arrays nest to this shape."""
    return sum(accumulate(shape[:-1], mul, initial=1))
