"""Ways to cut matrices over ranks, with uneven shards."""

import json
from typing import Any

from helpers.megatron_runs import Megatron, Run

CUT = {
    "rows": [24, 36, 0, [12, 12]],
    "uneven rows": [24, 36, 0, [5, 19]],
    "columns": [36, 24, 1, [12, 12]],
    "uneven columns": [36, 24, 1, [20, 4]],
    "short rows": [12, 40, 0, [6, 6]],
    "short columns": [40, 12, 1, [7, 5]],
    "square rows": [30, 30, 0, [15, 15]],
    "square columns": [30, 30, 1, [15, 15]],
}


def whole_and_cut(megatron: Megatron, kind: str, steps: int) -> list[Run]:
    """Steps of one kind on the matrices of ``CUT``, on one rank that has them whole and on two."""
    task = json.dumps({"matrices": CUT, "steps": steps, "kind": kind})
    return [megatron.run([task], ranks, main="tasks.thin:train") for ranks in (1, 2)]


# Both dimensions, long and short side cut, square, several of a shape (more than ranks divide), whole.
MATRICES: dict[str, Any] = {
    "rows": [24, 36, 0, None],
    "tall rows": [48, 18, 0, None],
    "columns": [36, 24, 1, None],
    "short columns": [48, 12, 1, None],
    "wide columns": [18, 36, 1, None],
    "square": [30, 30, 0, None],
    **{f"layer {i}": [24, 36, 0, None] for i in range(4)},
    "whole": [10, 14, None, None],
}
