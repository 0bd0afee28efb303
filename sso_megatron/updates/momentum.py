"""Updates the momentum of the spectral optimizers."""

import torch
from torch import Tensor


def update_momentum_(momentum: Tensor, gradient: Tensor, beta: float) -> None:
    """Update ``M <- beta M + (1 - beta) G`` in place (arXiv 2601.08393, Algorithm 1).

    There is no bias correction.

    Args:
        momentum: any shape.
        gradient: same shape; converted to the momentum's dtype.
        beta: in [0, 1).
    """
    momentum.lerp_(gradient.to(momentum.dtype), 1 - beta)


def update_heavy_ball_(momentum: Tensor, gradient: Tensor, mu: float) -> None:
    """Update ``M <- mu M + G`` in place (arXiv 2602.11185), rounded once where M is in half precision.

    Args:
        momentum: any shape.
        gradient: same shape, any dtype.
        mu: in [0, 1).
    """
    torch.add(gradient, momentum, alpha=mu, out=momentum)
