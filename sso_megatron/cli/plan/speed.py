"""Estimates the optimizer's share of an iteration from stated speeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sso_megatron.mcore.plan.records import Plan


@dataclass(frozen=True)
class Speed:
    """The stated speeds of a GPU.

    Attributes:
        model: FLOP/s that the GPU reaches in the model's products.
        step: FLOP/s that it reaches in the optimizer's products of float32 matrices.
        bandwidth: bytes a second that a rank receives from its tensor-parallel group; None if not stated.
    """

    model: float
    step: float
    bandwidth: float | None

    @classmethod
    def of(cls, flops: Sequence[float] | None, bandwidth: float | None) -> "Speed | None":
        """Return the speeds that the flags state; None without flags.

        Raises:
            ValueError: numbers that are not positive and finite, or too many, or a bandwidth alone.
        """
        if flops is None:
            if bandwidth is not None:
                raise ValueError(
                    f"--bandwidth {bandwidth:g} is read with --flops only; give both, or neither"
                )
            return None
        if len(flops) > 2:
            raise ValueError(
                f"--flops has {len(flops)} numbers; give one, or the model's and the optimizer's"
            )
        if not all(0 < speed < math.inf for speed in (*flops, 1.0 if bandwidth is None else bandwidth)):
            raise ValueError(
                "--flops and --bandwidth must be positive and finite, such as 400e12 60e12 and 300e9"
            )
        return cls(flops[0], flops[-1], bandwidth)

    def seconds(self, plan: Plan) -> tuple[float, float]:
        """Return seconds of a rank's forward and backward passes, and of the slowest rank's spectral step.

        Work that memory bounds (AdamW's, norms, sums) is left out, and so is waiting in the pipeline.

        Raises:
            ValueError: ranks exchange matrices, and no bandwidth is stated.
        """
        steps = []
        for rank in plan.ranks:
            if rank.load.received and self.bandwidth is None:
                raise ValueError(
                    "--flops without --bandwidth: tensor-parallel ranks exchange bytes; give both"
                )
            sent = rank.load.received / self.bandwidth if self.bandwidth else 0.0
            steps.append(rank.load.flops / self.step + sent)
        return plan.model_flops / plan.world_size / self.model, max(steps)

    def share(self, plan: Plan) -> float:
        """Return the share of the spectral step in an iteration, 0 to 1."""
        model, step = self.seconds(plan)
        return step / (model + step)
