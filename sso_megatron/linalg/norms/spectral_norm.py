"""Computes the spectral norm of one matrix for inspection, slowly and accurately."""

import torch
from torch import Tensor

from sso_megatron.linalg.power_iteration import power_iteration, start_basis

_EXACT_SIDE = 1024
"""Longest short side that is decomposed exactly, which takes about a second on one CPU core."""


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value: exact in float64 up to a short side of 1024, else by iteration.

    A larger matrix takes a long power iteration in its own dtype.

    Args:
        matrix: ``(m, n)``, float32 or float64.
    """
    if min(matrix.shape) <= _EXACT_SIDE:
        return torch.linalg.svdvals(matrix.double())[0].item()
    W = matrix.unsqueeze(0)
    return power_iteration(W, start_basis(W, 32), degree=10, num_passes=10).sigma.item()
