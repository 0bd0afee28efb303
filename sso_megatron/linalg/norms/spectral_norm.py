"""The spectral norm of one matrix, for looking at: slow and accurate."""

import torch
from torch import Tensor

from sso_megatron.linalg.power_iteration import power_iteration, start_basis

_EXACT_SIDE = 1024
"""Longest short side of an exact decomposition: about a second on one CPU core."""


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value: exact in float64 up to a short side of 1024, else by a long power iteration.

    Args:
        matrix: ``(m, n)``, float32 or float64; what is not decomposed is iterated in its own dtype.
    """
    if min(matrix.shape) <= _EXACT_SIDE:
        return torch.linalg.svdvals(matrix.double())[0].item()
    W = matrix.unsqueeze(0)
    return power_iteration(W, start_basis(W, 32), degree=10, num_passes=10).sigma.item()
