"""Estimates a spectral step's cost in each placement; ``--spectral-tp-mode auto`` takes the cheapest.

Costs are flops of one rank; a byte between ranks counts as ``flops_per_byte`` flops. Newton-Schulz
steps and their Gram matrices dominate; momentum, power iteration and retraction are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sso_megatron.linalg.polar import is_long
from sso_megatron.linalg.polar_line import num_measured_steps
from sso_megatron.parallel.shards import Cut, even_cut

_BYTES = 4  # matrices travel in float32


@dataclass(frozen=True)
class PolarWork:
    """How often a step runs the Newton-Schulz iteration.

    Attributes:
        num_trials: iterations for each matrix.
        num_steps: Newton-Schulz steps of each iteration.
        num_measures: iterations of its Gram matrix alone (``linalg.polar_line.GramLine``).
    """

    num_trials: int
    num_steps: int
    num_measures: int = 0

    def flops(self, shape: tuple[int, int]) -> float:
        """Return the flops for one whole matrix, in the form of ``linalg.polar.msign`` for its shape."""
        short, long = sorted(shape)
        if is_long(shape) and self.num_steps > 1:
            # Two Gram matrices and two products with it; six products of the short side's size a step for
            # the next Gram matrix, two for the polynomial, and less at either end of the two parts.
            one = 8.0 * long * short**2 + (8.0 * self.num_steps - 12) * short**3
        else:
            one = self.num_steps * (4.0 * long * short**2 + 2.0 * short**3)
        gram = 2.0 * long * short**2 if self.num_measures else 0.0
        return self.num_trials * one + gram + self._measured(short)

    def gram_flops(self, shape: tuple[int, int], partition_dim: int, tp_size: int) -> float:
        """Return the flops of one rank for a matrix whose shards stay (``parallel.placement.Distributed``).

        Counted are the Gram matrices of weight and momentum, one product of the momentum with the
        polynomial, and four products of the uncut side's size in each step of a trial. Nearly all of them
        are in float64, in which the tensor cores of A100 and H100 are as fast as in float32; other devices
        are not.
        """
        cut, side = shape[partition_dim] / tp_size, shape[1 - partition_dim]
        trials = self.num_trials * self.num_steps * 8.0 * side**3
        return 6.0 * cut * side**2 + trials + self._measured(side)

    def _measured(self, side: int) -> float:
        return self.num_measures * 6.0 * max(0, num_measured_steps(self.num_steps) - 1) * float(side) ** 3


def summed_bytes(side: int) -> tuple[int, ...]:
    """Return the bytes of one matrix in each all-reduce of a step of ``parallel.placement.Distributed``.

    The first all-reduce has the Gram matrices of weight and momentum, half of each; the second has vectors.

    Args:
        side: length of the side that is not cut.
    """
    return 8 * side * (side + 1), 8 * (side + 1)


def thin_summed_bytes(
    shape: tuple[int, int], partition_dim: int, width: int, num_passes: int = 1
) -> tuple[int, ...]:
    """Return the bytes of one matrix in each all-reduce of an algorithm whose products are thin.

    Its sums are those of ``linalg.block_iteration.iterate_block``, and one number.

    Args:
        shape: global ``(d_out, d_in)``.
        partition_dim: dimension that is cut.
        width: columns of the block.
        num_passes: passes of the power iteration.
    """
    m, n = shape
    if partition_dim:
        one: tuple[int, ...] = (m * width * _BYTES, n * width * _BYTES)
    else:
        one = (8 * width**2, 8 * width**2, n * width * _BYTES)
    return (*one * num_passes, 8)


def all_reduced(num_bytes: float, tp_size: int) -> float:
    """Return the bytes that each rank receives in an all-reduce of ``num_bytes``, by a ring: the fewest."""
    return 2 * num_bytes * (tp_size - 1) / tp_size


def mode_costs(
    num_matrices: int,
    shape: tuple[int, int],
    partition_dim: int,
    tp_size: int,
    *,
    work: PolarWork,
    flops_per_byte: float,
) -> dict[str, float]:
    """Return the cost of a step on equal cut matrices by mode, in flops of the busiest rank.

    The bytes that a rank receives are in ``duplicated`` weight and momentum; in ``owner`` the other shards
    of its own matrices, and its own shards of the others' updated weights; in ``distributed`` an all-reduce
    of ``summed_bytes``.

    Args:
        num_matrices: matrices of this shape.
        shape: global ``(d_out, d_in)``.
        partition_dim: dimension that is cut.
        tp_size: ranks of the group.
        work: Newton-Schulz iterations a step.
        flops_per_byte: flops in the time of one byte between ranks.
    """
    cuts = [even_cut(shape, partition_dim, tp_size)] * num_matrices
    gathered = 2 * sum(cut.numel(0) for cut in cuts) * (tp_size - 1) * _BYTES
    summed = all_reduced(num_matrices * sum(summed_bytes(shape[1 - partition_dim])), tp_size)
    gram_flops = num_matrices * work.gram_flops(shape, partition_dim, tp_size)
    return {
        "duplicated": num_matrices * work.flops(shape) + gathered * flops_per_byte,
        "owner": owner_cost(cuts, tp_size, work=work, flops_per_byte=flops_per_byte),
        "distributed": gram_flops + summed * flops_per_byte,
    }


def owner_cost(cuts: Sequence[Cut], tp_size: int, *, work: PolarWork, flops_per_byte: float) -> float:
    """Return the cost of a step in mode ``owner`` on matrices of any shapes, as in ``mode_costs``."""
    costs = [work.flops(cut.shape) for cut in cuts]
    loads = [0.0] * tp_size
    for cut, owner, cost in zip(cuts, assign_owners(costs, tp_size), costs, strict=True):
        loads[owner] += cost
        for rank in range(tp_size):
            shard = cut.numel(rank)
            received = 2 * (cut.shape[0] * cut.shape[1] - shard) if rank == owner else shard
            loads[rank] += received * _BYTES * flops_per_byte
    return max(loads)


def assign_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Return a rank for each matrix: the most expensive first, each to the rank with least work so far."""
    work, owners = [(0.0, 0)] * num_ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = owners[i] = work.index(min(work))
        cost, number = work[owner]
        work[owner] = (cost + costs[i], number + 1)
    return owners
