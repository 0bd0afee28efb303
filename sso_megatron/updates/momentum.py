"""Momentum shared by the spectral optimizers."""

from torch import Tensor


def update_momentum_(momentum: Tensor, gradient: Tensor, beta: float) -> None:
    """``M <- beta M + (1 - beta) G`` in place, no bias correction (arXiv 2601.08393, Algorithm 1).

    Args:
        momentum: any shape.
        gradient: same shape; converted to the momentum's dtype.
        beta: in [0, 1).
    """
    momentum.lerp_(gradient.to(momentum.dtype), 1 - beta)
