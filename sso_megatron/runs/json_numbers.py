"""Numbers in a run's files, written and read: null is NaN or not known, 1e999 infinite.

JSON has neither NaN nor infinity. Every parser reads 1e999 as infinity.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt


def json_text(value: Any) -> str:
    """A value as one line of JSON; floats in it keep all their digits."""
    return re.sub(r'"(-?1e999)"', r"\1", json.dumps(_without_special_floats(value), allow_nan=False))


def _without_special_floats(value: Any) -> Any:
    """A copy with None for NaN and the text 1e999 for infinity."""
    if isinstance(value, dict):
        return {key: _without_special_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_special_floats(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else _number_text(value)


def array_text(values: np.ndarray) -> str:
    """An array as a JSON list (of lists), each number with six significant digits."""
    if values.ndim > 1:
        return "[" + ",".join(map(array_text, values)) + "]"
    return "[" + ",".join(map(_number_text, values.tolist())) + "]"


def _number_text(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.6g}"
    return "null" if math.isnan(value) else f"{'-' if value < 0 else ''}1e999"


def number_of(value: Any) -> float | None:
    """A value read from JSON as a float; None where it is not a number, or an integer beyond floats."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def array_of(values: Iterable[Any], dtype: npt.DTypeLike = np.float64) -> np.ndarray:
    """Values read from JSON as an array of ``dtype``, (n,); NaN where a value is not a number."""
    numbers = (number_of(value) for value in values)
    return np.array([np.nan if number is None else number for number in numbers], dtype)
