"""Logical matrices of attention's projections, which are stored head by head."""

from collections.abc import Sequence
from typing import NamedTuple

from sso_megatron.matrices.layout import Split, row_splits


class Section(NamedTuple):
    """A run of heads inside a group.

    Attributes:
        label: ``q``, ``gate``, ``k`` or ``v``.
        heads: number of heads in each group.
        head_rows: rows of each head.
    """

    label: str
    heads: int
    head_rows: int


def head_splits(
    shape: Sequence[int],
    *,
    sections: Sequence[Section],
    granularity: str,
    tp_size: int,
    tp_rank: int,
) -> tuple[Split, ...]:
    """Return the logical matrices of a weight that is stored group by group, each group section by section.

    A fused QKV is such a weight, by its query groups, and so is an up projection of multi-latent attention,
    with groups of one head. Tensor parallelism cuts the weight into equal blocks of rows. Where there are
    more ranks than groups, heads may begin on one rank and end on another.

    Args:
        shape: stored local ``(rows, d_in)``.
        sections: what a group consists of, in stored order.
        granularity: ``head``, ``group`` (one matrix for each section of each group) or ``component``
            (one for each section).
        tp_size: ranks of the tensor-parallel group.
        tp_rank: this rank's place in it.

    Raises:
        ValueError: the weight is no whole number of groups.
    """
    rows = shape[0]
    group_rows = sum(heads * head_rows for _, heads, head_rows in sections)
    num_groups, rest = divmod(rows * tp_size, group_rows)
    if rest:
        raise ValueError(
            f"{rows} rows on each of {tp_size} ranks are no whole number of groups of {group_rows} rows; "
            "use --spectral-qkv-split whole"
        )
    # Where each matrix lies in the whole parameter, in the order of its first row.
    places: dict[str, list[tuple[int, int]]] = {}
    for group in range(num_groups):
        start = group * group_rows
        for label, heads, head_rows in sections:
            for head in range(heads):
                number = {"head": group * heads + head, "group": group, "component": ""}[granularity]
                _add(places.setdefault(f"{label}{number}", []), start, start + head_rows)
                start += head_rows
    parts = ((label, tuple(ranges)) for label, ranges in places.items())
    return row_splits(shape, parts, tp_size=tp_size, tp_rank=tp_rank)


def _add(ranges: list[tuple[int, int]], start: int, stop: int) -> None:
    """Append a range, or extend the last one where the two touch: one range can be read as a view."""
    if ranges and ranges[-1][1] == start:
        start, _ = ranges.pop()
    ranges.append((start, stop))
