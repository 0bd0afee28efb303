"""Matrices with given singular values."""

import numpy as np

from sso_megatron.linalg.coefficients import polar_coefficients

EIGHT = polar_coefficients("polar_express", 8)


def with_spectrum(m: int, n: int, singular_values: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    k = min(m, n)
    U, _ = np.linalg.qr(rng.standard_normal((m, k)))
    V, _ = np.linalg.qr(rng.standard_normal((n, k)))
    return (U * singular_values) @ V.T
