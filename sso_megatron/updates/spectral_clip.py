"""Takes clipped steps ``W <- W - lr alpha H_c(U)`` and schedules ``c`` (arXiv 2603.14315).

``U`` is the direction of an elementwise optimizer (``updates.bases``); weight decay comes before the step,
and is not clipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import AllReduce, frobenius_norm
from sso_megatron.linalg.spectral_clip import spectral_clip

# Takes the place of 0 where the schedule of c would reach it, or the learning rate starts from it: such a
# step moves nothing.
_LEAST = 1e-6


@dataclass(frozen=True)
class ClipSchedule:
    """The schedule of ``c`` over the steps: the numbers that do not change from step to step.

    Attributes:
        c: value between warmup and decay.
        warmup_steps: steps of the learning rate's warmup, in which ``c lr`` is constant; 0 for none.
        decay: ``none``, ``linear``, ``sqrt``, ``cosine``, ``exp`` or ``square``.
        decay_steps: number of the last steps, over which ``c`` decays.
        final: share of ``c`` that the decay ends at.
        num_steps: steps of the whole training; matters for the decay alone.
    """

    c: float
    warmup_steps: int = 0
    decay: str = "none"
    decay_steps: int = 0
    final: float = 0.0
    num_steps: int = 0

    def at(self, step: Tensor, lr: Tensor | float, peak: float) -> Tensor | float:
        """Return ``c`` at a step.

        Args:
            step: 0-d float64, counts from 1.
            lr: learning rate of that step.
            peak: learning rate that the warmup ends at; read during the warmup alone.

        Returns:
            A number if it never changes, else a 0-d float64 tensor; positive.
        """
        if not self.warmup_steps and self.decay == "none":
            return self.c
        factor = torch.ones_like(step)
        if self.decay != "none":
            done = (step - 1 - (self.num_steps - self.decay_steps)) / self.decay_steps
            factor = self._decayed(done.clamp(0, 1)).clamp_min(_LEAST)
        if self.warmup_steps:
            ratio = torch.ones_like(step) * lr / peak
            factor = torch.where(step <= self.warmup_steps, 1 / ratio.clamp_min(_LEAST), factor)
        return self.c * factor

    def _decayed(self, done: Tensor) -> Tensor:
        """Return the share of ``c`` that is left when the share ``done`` of the decay is over."""
        if self.decay == "exp":
            return torch.pow(self.final, done)
        return self.final + (1 - self.final) * _SHAPES[self.decay](done)


_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - done.sqrt(),
    "cosine": lambda done: (1 + torch.cos(math.pi * done)) / 2,
    "square": lambda done: 1 - done.square(),
}


def clipped_step_(
    W: Tensor,
    U: Tensor,
    *,
    c: Tensor | float,
    scale: float,
    lr: Tensor | float,
    coefficients: Coefficients,
    all_reduce: AllReduce | None = None,
    measures: bool = False,
) -> Tensor | None:
    """Take the step ``W <- W - lr scale H_c(U)`` in place.

    Args:
        W: ``(b, m, n)`` weights, float32 or float64, whole logical matrices or this rank's rows.
        U: ``(b, m, n)`` direction, same dtype.
        c: bound of ``||H_c(U)||``.
        scale: ``alpha`` of the paper.
        lr: learning rate, a number or a 0-d tensor.
        coefficients: Newton-Schulz polynomials.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices. It is called once,
            with ``(b, n, n)`` float64 numbers.
        measures: whether the result is wanted, for which ``all_reduce`` is called once more, with
            ``(b, 2)``.

    Returns:
        The share that clipping removed, ``1 - ||H_c(U)||_F^2 / ||U||_F^2``, ``(b,)``; None if not wanted.
    """
    H = spectral_clip(U, c, coefficients, all_reduce)
    squares = (
        torch.stack([frobenius_norm(H), frobenius_norm(U)], dim=1).double().square() if measures else None
    )
    W.sub_(H.mul_(scale * lr))
    if squares is None:
        return None
    clipped, unclipped = (squares if all_reduce is None else all_reduce(squares)).unbind(dim=1)
    return 1 - torch.where(unclipped > 0, clipped / unclipped, 1)


def clip_vectors_(vectors: list[Tensor], norms: Tensor, c: Tensor | float, is_continuous: bool) -> None:
    """Clip vectors in place, each by its own Euclidean norm.

    A vector becomes ``v / sqrt(1 + ||v||^2 / c^2)``, which is what ``H_c`` makes of a matrix of one column.
    As published, and if not ``is_continuous``, a vector with ``||v|| <= c`` does not change: where the norm
    exceeds ``c`` it falls at once to ``0.71 c``.

    Args:
        vectors: any shapes, one floating-point dtype; whole vectors, or this rank's shards of them.
        norms: Euclidean norms of the whole vectors, one each.
        c: positive; a number, or 0-d on the device.
        is_continuous: whether to clip short vectors too.
    """
    ratios = norms / c
    factors = torch.hypot(ratios, torch.ones_like(ratios)).reciprocal()
    if not is_continuous:
        factors = torch.where(ratios <= 1, 1.0, factors)
    torch._foreach_mul_(vectors, list(factors.to(norms.dtype).unbind()))
