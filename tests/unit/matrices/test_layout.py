"""The map between stored parameters and logical matrices: by value, over all ranks, inverted exactly."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sso_megatron.matrices.attention import Section, head_splits
from sso_megatron.matrices.layout import (
    ParameterLayout,
    Split,
    gate_up_splits,
    packed_splits,
    row_splits,
    section_splits,
    whole,
)
from sso_megatron.matrices.scaling import target_radius, update_scale

COLUMNS = 6


@dataclass
class Case:
    """A parameter as all ranks of a group store it, and what it consists of.

    Attributes:
        shards: what each rank stores.
        splits: what each rank says of it.
        expected: every logical matrix by label, cut out of the whole by other means.
    """

    shards: list[Tensor]
    splits: list[tuple[Split, ...]]
    expected: dict[str, Tensor]


def numbered(*shape: int) -> Tensor:
    """No two entries are equal."""
    return torch.arange(float(math.prod(shape))).view(shape)


# ---------------------------------------------------------------- stored forms


def whole_case(dim: int | None, tp: int) -> Case:
    weight = numbered(24, 8)
    shards = [weight] * tp if dim is None else list(weight.chunk(tp, dim))
    splits = [(whole(s.shape, dim, tp if dim is not None else 1),) for s in shards]
    return Case(shards[: 1 if dim is None else tp], splits[: 1 if dim is None else tp], {"": weight})


def qkv_case(granularity: str, groups: int, queries: int, tp: int, gated: bool = False) -> Case:
    """Groups of ``queries`` q heads, as many gate heads if gated, one k and one v head, of four rows."""
    sizes = {"q": queries, "gate": queries * gated, "k": 1, "v": 1}
    stored = numbered(groups, sum(sizes.values()), 4, COLUMNS)
    parts = dict(zip(sizes, stored.split(list(sizes.values()), dim=1), strict=True))
    expected = {}
    for label, part in parts.items():
        if granularity == "component" and part.numel():
            expected[label] = part.reshape(-1, COLUMNS)
        elif granularity == "group":
            expected |= {f"{label}{g}": heads.flatten(0, 1) for g, heads in enumerate(part) if len(heads)}
        elif granularity == "head":
            expected |= {f"{label}{h}": head for h, head in enumerate(part.flatten(0, 1))}
    sections = [Section(label, heads, 4) for label, heads in sizes.items() if heads]
    return row_cut_case(stored.flatten(0, 2), sections, granularity, tp, expected)


def latent_case(granularity: str, widths: dict[str, int], heads: int, tp: int) -> Case:
    """An up projection of latent attention: for each head the rows of each part."""
    stored = numbered(heads, sum(widths.values()), COLUMNS)
    expected = {}
    for label, part in zip(widths, stored.split(list(widths.values()), dim=1), strict=True):
        if granularity == "component":
            expected[label] = part.reshape(-1, COLUMNS)
        else:
            expected |= {f"{label}{h}": part[h] for h in range(heads)}
    sections = [Section(label, 1, rows) for label, rows in widths.items()]
    return row_cut_case(stored.flatten(0, 1), sections, granularity, tp, expected)


def row_cut_case(
    stored: Tensor, sections: list[Section], granularity: str, tp: int, expected: dict[str, Tensor]
) -> Case:
    shards = list(stored.chunk(tp))
    splits = [
        head_splits(s.shape, sections=sections, granularity=granularity, tp_size=tp, tp_rank=rank)
        for rank, s in enumerate(shards)
    ]
    return Case(shards, splits, expected)


def gate_up_shard(gate: Tensor, up: Tensor, interleave: int) -> Tensor:
    """What a rank stores of its rows of gate and up."""
    if not interleave:
        return torch.cat([gate, up])
    blocks = [b for pair in zip(gate.split(interleave), up.split(interleave), strict=True) for b in pair]
    return torch.cat(blocks)


def gate_up_case(tp: int, interleave: int = 0) -> Case:
    gate, up = numbered(2, 24, COLUMNS)
    shards = [gate_up_shard(g, u, interleave) for g, u in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
    dim = 0 if tp > 1 else None
    splits = [gate_up_splits(s.shape, dim, tp, interleave) for s in shards]
    return Case(shards, splits, {"gate": gate, "up": up})


def latent_down_case(tp: int) -> Case:
    q, kv = numbered(28, COLUMNS).split([16, 12])
    shards = [torch.cat(pair) for pair in zip(q.chunk(tp), kv.chunk(tp), strict=True)]
    dim = 0 if tp > 1 else None
    splits = [section_splits(s.shape, [("q", 16), ("kv", 12)], dim, tp) for s in shards]
    return Case(shards, splits, {"q": q, "kv": kv})


def packed_fc1_case(is_3d: bool, tp: int, interleave: int = 0) -> Case:
    """Experts 4, 5 and 6 of a model."""
    experts = numbered(3, 2, 8, COLUMNS)
    shards, splits = [], []
    for rank in range(tp):
        own = [gate_up_shard(gate.chunk(tp)[rank], up.chunk(tp)[rank], interleave) for gate, up in experts]
        stored = torch.stack(own) if is_3d else torch.cat(own)
        one = gate_up_splits(own[0].shape, 0 if tp > 1 else None, tp, interleave)
        shards.append(stored)
        splits.append(packed_splits(stored.shape, one, (4, 5, 6)))
    expected = {
        f"expert{4 + e}.{half}": experts[e, i] for e in range(3) for i, half in enumerate(("gate", "up"))
    }
    return Case(shards, splits, expected)


def packed_fc2_case(is_3d: bool, tp: int) -> Case:
    experts = numbered(3, 5, 8)
    shards = [s if is_3d else s.flatten(0, 1) for s in experts.chunk(tp, dim=2)]
    splits = [
        packed_splits(s.shape, [whole((5, 8 // tp), 1 if tp > 1 else None, tp)], (4, 5, 6)) for s in shards
    ]
    return Case(shards, splits, {f"expert{4 + e}": experts[e] for e in range(3)})


GRANULARITIES = ("head", "group", "component")
CASES = {
    **{f"whole-dim{dim}-tp{tp}": whole_case(dim, tp) for dim in (None, 0, 1) for tp in (1, 4)},
    # Groups, q heads of each, tensor-parallel sizes: fewer ranks than groups, then more.
    **{
        f"qkv-{granularity}-{groups}x{queries}-tp{tp}": qkv_case(granularity, groups, queries, tp)
        for granularity in GRANULARITIES
        for groups, queries, sizes in (
            (4, 1, (1, 2, 4)),  # multi-head
            (4, 3, (1, 2, 4)),
            (2, 3, (4, 8)),
            (1, 4, (1, 2, 4, 8)),  # multi-query
        )
        for tp in sizes
    },
    **{
        f"gated-{granularity}-tp{tp}": qkv_case(granularity, 2, 2, tp, gated=True)
        for granularity in GRANULARITIES
        for tp in (1, 2, 4, 8)
    },
    **{
        f"latent-{granularity}-{'+'.join(widths)}-tp{tp}": latent_case(granularity, widths, 4, tp)
        for granularity in GRANULARITIES
        for widths in ({"q": 5}, {"k": 3, "v": 2})
        for tp in (1, 2, 4)
    },
    **{f"gate_up-tp{tp}": gate_up_case(tp) for tp in (1, 2, 4)},
    **{f"interleaved-{i}-tp{tp}": gate_up_case(tp, i) for i in (2, 6, 12) for tp in (1, 2)},
    **{f"latent-down-tp{tp}": latent_down_case(tp) for tp in (1, 2, 4)},
    **{
        f"packed-{'3d' if is_3d else '2d'}-fc1-interleave{i}-tp{tp}": packed_fc1_case(is_3d, tp, i)
        for is_3d in (True, False)
        for tp in (1, 2)
        for i in (0, 2)
    },
    **{
        f"packed-{'3d' if is_3d else '2d'}-fc2-tp{tp}": packed_fc2_case(is_3d, tp)
        for is_3d in (True, False)
        for tp in (1, 2)
    },
}


# ---------------------------------------------------------------- what holds for each of them


def assembled(case: Case) -> dict[str, Tensor]:
    """Logical matrices put together from all ranks, as the engine does."""
    matrices: dict[str, Tensor] = {}
    for splits, shard in zip(case.splits, case.shards, strict=True):
        for split in splits:
            part = split.read(shard)
            if split.label not in matrices:
                matrices[split.label] = part
            else:
                assert split.partition_dim is not None, "a whole matrix lies on one rank alone"
                matrices[split.label] = torch.cat([matrices[split.label], part], split.partition_dim)
    return matrices


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_is_read_whole_and_written_back(name: str) -> None:
    case = CASES[name]
    found = assembled(case)
    assert found.keys() == case.expected.keys()
    for label, matrix in case.expected.items():
        assert torch.equal(found[label], matrix), label
    for splits, shard in zip(case.splits, case.shards, strict=True):
        empty = torch.full_like(shard, -1)
        for split in splits:
            # A batch of uneven shards is padded: what is beyond a part's rows is not written.
            padding = torch.full((3, shard.size(-1)), math.nan)
            split.write_(empty, torch.cat([split.read(shard), padding]))
        assert torch.equal(empty, shard), "every row is in one matrix, and in one only"


@pytest.mark.parametrize("name", CASES)
def test_radius_and_scale_come_from_the_global_shape(name: str) -> None:
    case = CASES[name]
    for splits in case.splits:
        for split in splits:
            d_out, d_in = case.expected[split.label].shape
            assert split.shape == (d_out, d_in)
            assert target_radius(split.shape, "spectral_mup", 1.5) == pytest.approx(
                1.5 * math.sqrt(d_out / d_in)
            )
            assert update_scale(split.shape, "align_adam_rms", 1.0) == pytest.approx(
                0.2 * math.sqrt(max(d_out, d_in))
            )


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_list_the_cut_matrices_alike(name: str) -> None:
    """In the same order and with the same rows for each rank: collectives follow the lists."""
    case = CASES[name]
    cut = [
        [(s.label, s.shape, s.partition_dim, s.shard_rows) for s in splits if s.partition_dim is not None]
        for splits in case.splits
    ]
    assert all(listed == cut[0] for listed in cut)
    for rank, splits in enumerate(case.splits):
        for split in splits:
            rows = sum(stop - start for start, stop in split.rows)
            expected = {None: split.shape[0], 1: split.shape[0], 0: split.shape[0] / len(case.shards)}
            if split.shard_rows is not None:
                assert split.partition_dim == 0 and len(set(split.shard_rows)) > 1
                expected[0] = split.shard_rows[rank]
            assert rows == expected[split.partition_dim]


# ---------------------------------------------------------------- by hand


def qkv(rows: int, granularity: str, tp_size: int = 1, tp_rank: int = 0) -> tuple[Split, ...]:
    sections = [Section("q", 3, 4), Section("k", 1, 4), Section("v", 1, 4)]
    return head_splits(
        (rows, 7), sections=sections, granularity=granularity, tp_size=tp_size, tp_rank=tp_rank
    )


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


def test_one_group_over_four_ranks() -> None:
    """Twenty rows, five on a rank: heads of four rows begin at 0, 4, 8, 12 and 16."""
    ranks = [qkv(5, "head", tp_size=4, tp_rank=rank) for rank in range(4)]
    assert [[s.label for s in splits] for splits in ranks] == [
        ["q0", "q1", "q2", "k0"],
        ["q1", "q2", "k0"],
        ["q1", "q2", "k0"],
        ["q1", "q2", "k0", "v0"],
    ]
    q1, q2, k0 = ranks[1]
    assert (q1.rows, q1.shard_rows, q1.shape) == (((0, 3),), (1, 3, 0, 0), (4, 7))
    assert (q2.rows, q2.shard_rows) == (((3, 5),), (0, 2, 2, 0))
    assert (k0.rows, k0.shard_rows) == ((), (0, 0, 3, 1)), "none of its rows, but it joins in"
    assert {s.label: s.partition_dim for s in ranks[0]} == {"q0": None, "q1": 0, "q2": 0, "k0": 0}
    stored = torch.ones(5, 7)
    assert k0.read(stored).shape == (0, 7)


def test_rows_that_touch_are_read_as_a_view() -> None:
    (q,) = head_splits(
        (12, 3), sections=[Section("q", 1, 4)], granularity="component", tp_size=1, tp_rank=0
    )
    stored = torch.zeros(12, 3)
    assert q.rows == ((0, 12),) and q.read(stored).data_ptr() == stored.data_ptr()


def test_blocks_of_rows_cut_in_two() -> None:
    """A matrix in two runs of rows; the cut goes through the second."""
    parts = [("a", ((0, 2), (6, 10))), ("b", ((2, 6),))]
    first, second = (row_splits((8, 3), parts, tp_size=2, tp_rank=rank) for rank in range(2))
    assert [s.label for s in first] == ["a", "b"]
    assert (first[0].rows, first[0].shard_rows) == (((0, 2), (6, 8)), (4, 2))
    assert (first[1].rows, first[1].partition_dim) == (((2, 6),), None)
    assert [(s.label, s.rows) for s in second] == [("a", ((0, 2),))]


def test_global_shapes_of_cut_matrices() -> None:
    assert whole((6, 7), 0, 4).shape == (24, 7)
    assert whole((6, 7), 1, 4).shape == (6, 28)
    assert [s.shape for s in gate_up_splits((10, 7), 0, 2)] == [(10, 7), (10, 7)]
    assert [s.shape for s in qkv(40, "component", tp_size=2)] == [(48, 7), (16, 7), (16, 7)]
    assert {s.partition_dim for s in qkv(40, "component", tp_size=2)} == {0}
    assert {s.partition_dim for s in qkv(40, "head", tp_size=2)} == {None}, "heads are whole on a rank"


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"30 rows on each of 1 ranks are no whole number of groups of 20 rows; .*whole"
    ):
        qkv(30, "head")
    with pytest.raises(ValueError, match="two halves, but its weight has 9 rows"):
        gate_up_splits((9, 4), None, 1)
    with pytest.raises(ValueError, match="blocks of 4 rows in turn, but its weight has 12 rows"):
        gate_up_splits((12, 4), None, 1, interleave=4)
    with pytest.raises(ValueError, match=r"14 rows on each of 2 ranks do not hold 16 \(q\) and 13 \(kv\)"):
        section_splits((14, 4), [("q", 16), ("kv", 13)], 0, 2)
    with pytest.raises(ValueError, match=r"\(2, 4, 8\) does not hold 4 experts"):
        packed_splits((2, 4, 8), [whole((4, 8))], range(4))


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
