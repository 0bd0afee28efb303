"""Weights and momenta that SSO's search is tried on."""

import numpy as np


def noise_problem(shape: tuple[int, int], seed: int):
    """Gradients of pure noise."""
    rng = np.random.default_rng(seed)
    return lambda W: rng.standard_normal(shape)


def low_rank_problem(shape: tuple[int, int], seed: int):
    """Pull towards a matrix of rank 3, plus noise: the momentum has a few large directions."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    return lambda W: (W - target) + 0.3 * rng.standard_normal(shape)


def start(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(1000 + seed).standard_normal(shape) * 0.02
