"""The map between stored parameters and logical matrices: exact inversion, global shapes, numbering."""

import pytest
import torch

from sso_megatron.matrices.layout import ParameterLayout, Split, gate_up_splits, qkv_splits, whole
from sso_megatron.matrices.scaling import target_radius, update_scale

GQA = [("q", 3), ("k", 1), ("v", 1)]
GATED = [("q", 2), ("gate", 2), ("k", 1), ("v", 1)]


def qkv(rows: int, granularity: str, sections=GQA, tp_size: int = 1, tp_rank: int = 0) -> tuple[Split, ...]:  # type: ignore[no-untyped-def]
    return qkv_splits(
        (rows, 7),
        sections=sections,
        head_dim=4,
        granularity=granularity,
        tp_size=tp_size,
        tp_rank=tp_rank,
    )


CASES = {
    "whole": (whole((6, 7)), 6),
    "gate_up": (gate_up_splits((10, 7), None, 1), 10),
    **{f"qkv-{g}": (qkv(40, g), 40) for g in ("head", "group", "component")},
    **{f"gated-{g}": (qkv(48, g, GATED), 48) for g in ("head", "group", "component")},
}


@pytest.mark.parametrize("case", CASES)
def test_reading_and_writing_invert_each_other(case: str) -> None:
    splits, rows = CASES[case]
    splits = splits if isinstance(splits, tuple) else (splits,)
    stored = torch.arange(rows * 7.0).view(rows, 7)
    parts = [split.read(stored).clone() for split in splits]
    assert sum(len(part) for part in parts) == rows
    assert torch.equal(torch.cat(parts).sort(dim=0).values, stored), "every row exactly once"
    copy = torch.full_like(stored, -1)
    for split, part in zip(splits, parts, strict=True):
        assert tuple(part.shape) == split.shape
        split.write_(copy, part)
    assert torch.equal(copy, stored)


def test_heads_are_numbered_over_the_whole_model() -> None:
    """Two groups a rank; the second rank of two holds groups 2 and 3."""
    labels = [s.label for s in qkv(40, "head", tp_size=2, tp_rank=1)]
    assert labels == ["q6", "q7", "q8", "k2", "v2", "q9", "q10", "q11", "k3", "v3"]
    assert [s.label for s in qkv(40, "group", tp_size=2, tp_rank=1)] == ["q2", "k2", "v2", "q3", "k3", "v3"]


def test_rows_of_a_group_lie_where_megatron_puts_them() -> None:
    q, k, v = qkv(40, "component")
    assert (
        q.rows == ((0, 12), (20, 32)) and k.rows == ((12, 16), (32, 36)) and v.rows == ((16, 20), (36, 40))
    )


def test_global_shapes_of_cut_matrices() -> None:
    assert whole((6, 7), 0, 4).shape == (24, 7)
    assert whole((6, 7), 1, 4).shape == (6, 28)
    assert [s.shape for s in gate_up_splits((10, 7), 0, 2)] == [(10, 7), (10, 7)]
    assert [s.shape for s in qkv(40, "component", tp_size=2)] == [(48, 7), (16, 7), (16, 7)]
    assert {s.partition_dim for s in qkv(40, "component", tp_size=2)} == {0}
    assert {s.partition_dim for s in qkv(40, "head", tp_size=2)} == {None}, "heads are whole on a rank"


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"30 rows are no whole number of query groups of 20 rows; .*divides"
    ):
        qkv(30, "head")
    with pytest.raises(ValueError, match="two halves, but its weight has 9 rows"):
        gate_up_splits((9, 4), None, 1)


def test_writing_converts_to_the_stored_dtype() -> None:
    stored = torch.zeros(4, 3, dtype=torch.bfloat16)
    whole((4, 3)).write_(stored, torch.full((4, 3), 1.5))
    assert torch.equal(stored, torch.full((4, 3), 1.5, dtype=torch.bfloat16))


def test_matrix_names() -> None:
    layout = ParameterLayout("layers.3.fc1", gate_up_splits((8, 4), None, 1))
    assert [layout.matrix_name(s) for s in layout.splits] == ["layers.3.fc1[gate]", "layers.3.fc1[up]"]
    assert ParameterLayout("x", (whole((2, 2)),)).matrix_name(whole((2, 2))) == "x"


def test_radius_and_scale_by_hand() -> None:
    assert target_radius((64, 16), "spectral_mup", 1.5) == 3.0
    assert target_radius((64, 16), "identity", 1.5) == 1.5
    assert update_scale((64, 16), "spectral_mup", 3.0) == 3.0
    assert update_scale((64, 16), "align_adam_rms", 3.0) == pytest.approx(1.6)
    assert update_scale((64, 16), "spectral_kaiming", 3.0) == 2.0
    assert update_scale((16, 64), "spectral_kaiming", 3.0) == 1.0
