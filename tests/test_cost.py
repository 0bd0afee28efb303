"""The cost model of --spectral-tp-mode auto, by hand-counted cases and by its limits."""

import pytest

from sso_megatron.parallel.cost import PolarWork, mode_costs

WORK = PolarWork(num_trials=2, num_steps=8)


def test_flops_by_hand() -> None:
    # One step on (L, s) = (96, 64): Gram 2*96*64^2, its square 2*64^3, product 2*96*64^2.
    assert PolarWork(1, 1).flops((64, 96)) == 2 * 96 * 64**2 + 2 * 64**3 + 2 * 96 * 64**2
    assert WORK.flops((96, 64)) == 16 * PolarWork(1, 1).flops((64, 96))
    # Rows of (96, 64) cut in two: three products of (48, 64) with 64 columns; four of 64^3 a trial step.
    assert PolarWork(1, 1).gram_flops((96, 64), 0, 2) == 3 * 2 * 48 * 64**2 + 4 * 2 * 64**3


def test_costs_by_hand() -> None:
    """Eight matrices (96, 64) over two ranks, a byte for free, then flops for free."""
    free = mode_costs(8, (96, 64), 0, 2, work=WORK, flops_per_byte=0.0)
    assert free["duplicated"] == 8 * WORK.flops((96, 64))
    assert free["owner"] == 4 * WORK.flops((96, 64))
    idle = mode_costs(8, (96, 64), 0, 2, work=PolarWork(0, 0), flops_per_byte=1.0)
    # The other halves of 8 weights and momenta; of 4, and own halves of 4 weights; three all-reduces.
    assert idle["duplicated"] == 8 * 2 * 48 * 64 * 4
    assert idle["owner"] == (4 * 2 + 4) * 48 * 64 * 4
    assert idle["distributed"] == 8 * 6 * 48 * 64**2 + 8 * 3 * 64**2 * 4


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
def test_choices(num_matrices, shape, dim, tp, flops_per_byte, expected) -> None:  # type: ignore[no-untyped-def]
    batch = (num_matrices, shape, dim, tp)
    costs = mode_costs(*batch, work=WORK, flops_per_byte=flops_per_byte)
    assert min(costs, key=costs.__getitem__) == expected, costs
