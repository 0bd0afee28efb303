"""What a spectral step costs in each placement: the model behind ``--spectral-tp-mode auto``.

Costs are flops of one rank; a byte between ranks counts as ``flops_per_byte`` flops. Newton-Schulz
steps and their Gram matrices dominate; momentum, power iteration and retraction are left out.
"""

from dataclasses import dataclass

_BYTES = 4  # matrices travel in float32


@dataclass(frozen=True)
class PolarWork:
    """How often a step runs the Newton-Schulz iteration.

    Attributes:
        num_trials: times for each matrix.
        num_steps: Newton-Schulz steps each time.
    """

    num_trials: int
    num_steps: int

    def flops(self, shape: tuple[int, int]) -> float:
        """For one whole matrix: Gram matrix, its square and the product with the matrix each step."""
        short, long = sorted(shape)
        return self.num_trials * self.num_steps * (4.0 * long * short**2 + 2.0 * short**3)

    def gram_flops(self, shape: tuple[int, int], partition_dim: int, tp_size: int) -> float:
        """For one matrix in Gram form on shards: ``parallel.placement.Distributed``.

        Gram matrices of weight and momentum and one product of the momentum with the polynomial, and
        four products of the uncut side's size in each step of a trial. Nearly all of it is in
        float64, which the tensor cores of A100 and H100 do as fast as float32; other devices do not.
        """
        cut, side = shape[partition_dim] / tp_size, shape[1 - partition_dim]
        return 6.0 * cut * side**2 + self.num_trials * self.num_steps * 8.0 * side**3


def mode_costs(
    num_matrices: int,
    shape: tuple[int, int],
    partition_dim: int,
    tp_size: int,
    *,
    work: PolarWork,
    flops_per_byte: float,
) -> dict[str, float]:
    """Cost of a step on a batch of cut matrices by mode, in flops of one rank.

    Bytes that each rank receives: ``duplicated`` gathers weight and momentum; ``owner`` receives the
    other shards of its own matrices, and its own shards of the others' updated weights;
    ``distributed`` all-reduces a Gram matrix of the uncut side in float32 and one in float64.

    Args:
        num_matrices: matrices of this shape.
        shape: global ``(d_out, d_in)``.
        partition_dim: dimension that is cut.
        tp_size: ranks of the group.
        work: Newton-Schulz iterations a step.
        flops_per_byte: flops in the time of one byte between ranks.
    """
    elements = shape[0] * shape[1]
    side = shape[1 - partition_dim]
    others = (tp_size - 1) / tp_size
    owned = -(-num_matrices // tp_size)
    received = {
        "duplicated": 2 * num_matrices * elements * others,
        "owner": (2 * owned + num_matrices / tp_size) * elements * others,
        "distributed": 3 * num_matrices * side**2 * 2 * others,
    }
    flops = {
        "duplicated": num_matrices * work.flops(shape),
        "owner": owned * work.flops(shape),
        "distributed": num_matrices * work.gram_flops(shape, partition_dim, tp_size),
    }
    return {mode: flops[mode] + received[mode] * _BYTES * flops_per_byte for mode in flops}
