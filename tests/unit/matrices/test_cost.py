"""The cost model of --spectral-tp-mode auto, by hand-counted cases and by its limits."""

import pytest

from sso_megatron.parallel.cost import PolarWork, assign_owners, mode_costs, owner_cost
from sso_megatron.parallel.shards import Cut, even_cut

WORK = PolarWork(num_trials=2, num_steps=8)


def test_flops_by_hand() -> None:
    # One step on (L, s) = (96, 64): Gram 2*96*64^2, its square 2*64^3, product 2*96*64^2.
    assert PolarWork(1, 1).flops((64, 96)) == 2 * 96 * 64**2 + 2 * 64**3 + 2 * 96 * 64**2
    assert WORK.flops((96, 64)) == 16 * PolarWork(1, 1).flops((64, 96))
    # Long ones take the Gram form: two Gram matrices, two products with them; of the short side's size
    # 8 squares, 6 products for the next polynomials, and 6 times two for the next Gram matrices.
    assert PolarWork(1, 8).flops((256, 64)) == 4 * 2 * 256 * 64**2 + (2 * 6 + 6 + 8) * 2 * 64**3
    # Measured by one Gram matrix and five steps, four of which make the next: three products each.
    measured = PolarWork(1, 8, num_measures=1).flops((96, 64)) - PolarWork(1, 8).flops((96, 64))
    assert measured == 2 * 96 * 64**2 + 4 * 3 * 2 * 64**3
    # Rows of (96, 64) cut in two: three products of (48, 64) with 64 columns; four of 64^3 a trial step.
    assert PolarWork(1, 1).gram_flops((96, 64), 0, 2) == 3 * 2 * 48 * 64**2 + 4 * 2 * 64**3


def test_costs_by_hand() -> None:
    """Eight matrices (96, 64) over two ranks, a byte for free, then flops for free."""
    free = mode_costs(8, (96, 64), 0, 2, work=WORK, flops_per_byte=0.0)
    assert free["duplicated"] == 8 * WORK.flops((96, 64))
    assert free["owner"] == 4 * WORK.flops((96, 64))
    idle = mode_costs(8, (96, 64), 0, 2, work=PolarWork(0, 0), flops_per_byte=1.0)
    # The other halves of 8 weights and momenta; of 4, and own halves of 4 weights; two all-reduces of 8
    # bytes a number: halves of two Gram matrices with both diagonals, and a vector with one number more.
    assert idle["duplicated"] == 8 * 2 * 48 * 64 * 4
    assert idle["owner"] == (4 * 2 + 4) * 48 * 64 * 4
    assert idle["distributed"] == 8 * 6 * 48 * 64**2 + 8 * (64 * 65 * 8 + 65 * 8)


def test_bytes_over_four_ranks_by_hand() -> None:
    """Two ranks do not tell the number of ranks, of other ranks and a ring's two passes apart."""
    idle = mode_costs(8, (96, 64), 0, 4, work=PolarWork(0, 0), flops_per_byte=1.0)
    # Shards of 24 rows: of 8 weights and momenta the three others; of 2, and own shards of 6 weights.
    assert idle["duplicated"] == 8 * 2 * 3 * 24 * 64 * 4
    assert idle["owner"] == (2 * 2 * 3 + 6) * 24 * 64 * 4
    # A ring passes three quarters on twice: once to sum them, once to hand the sums out.
    assert idle["distributed"] == 8 * 6 * 24 * 64**2 + 2 * 3 / 4 * 8 * (64 * 65 * 8 + 65 * 8)


@pytest.mark.parametrize(
    ("num_matrices", "shape", "dim", "tp", "flops_per_byte", "expected"),
    [
        (56, (6144, 2048), 0, 8, 200.0, "owner"),  # gate and up of 28 layers
        (28, (2048, 6144), 1, 8, 200.0, "owner"),  # down
        (1, (65536, 1024), 0, 8, 200.0, "distributed"),  # one long matrix: nothing to share out
        (1, (1024, 8192), 0, 2, 10.0, "duplicated"),  # short side cut: the Gram matrix is of the long one
        (1, (64, 64), 0, 2, 0.0, "duplicated"),
    ],
)
def test_choices(num_matrices, shape, dim, tp, flops_per_byte, expected) -> None:
    batch = (num_matrices, shape, dim, tp)
    costs = mode_costs(*batch, work=WORK, flops_per_byte=flops_per_byte)
    assert min(costs, key=costs.__getitem__) == expected, costs


def test_owners_get_equal_work() -> None:
    assert assign_owners([1, 1, 1, 3, 1, 1], 2) == [1, 1, 1, 0, 0, 1]
    assert assign_owners([0.0] * 4, 3) == [0, 1, 2, 0]
    assert assign_owners([5.0], 3) == [0]


def test_cost_of_owners_by_hand() -> None:
    """Of two shapes, one cut unevenly, over two ranks: the busier rank counts."""
    cuts = [even_cut((96, 64), 0, 2), Cut((64, 64), 0, (48, 16))]
    flops = [WORK.flops((96, 64)), WORK.flops((64, 64))]
    assert owner_cost(cuts, 2, work=WORK, flops_per_byte=0.0) == flops[0]
    # Rank 0 owns the first: its other half twice, and its own 48 rows of the second.
    assert owner_cost(cuts, 2, work=WORK, flops_per_byte=1.0) == flops[0] + 4 * 64 * (2 * 48 + 48)
