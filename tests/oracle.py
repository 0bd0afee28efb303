"""Reference implementations by exact SVD in float64 numpy; they share no code with the package."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def polar_factor(X: Array) -> Array:
    """U V^T of a matrix of full rank."""
    U, _, Vt = np.linalg.svd(X, full_matrices=False)
    return U @ Vt


def newton_schulz_factor(X: Array, coefficients: tuple[tuple[float, float, float], ...]) -> Array:
    """What a Newton-Schulz iteration makes of X: its polynomial on each exact singular value.

    Unlike ``polar_factor`` it leaves singular values below the table's bound smaller than 1.
    """
    U, S, Vt = np.linalg.svd(X, full_matrices=False)
    S = S / np.linalg.norm(S)
    for a, b, c in coefficients:
        S = a * S + b * S**3 + c * S**5
    return (U * S) @ Vt


def top_triplet(W: Array) -> tuple[float, Array, Array]:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return float(S[0]), U[:, 0], Vt[0]


def tangent_root(M: Array, Theta: Array, factor: Callable[[Array], Array] = polar_factor) -> float:
    """lam with <Theta, factor(M + lam Theta)> = 0, to rounding, by plain bisection."""

    def h(lam: float) -> float:
        return float(np.sum(Theta * factor(M + lam * Theta)))

    reach = 2 * float(np.linalg.svd(M, compute_uv=False).sum())
    low, high = -reach, reach
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if h(middle) < 0 else (low, middle)
    return (low + high) / 2


def sso_step(
    W: Array,
    buffer: Array,
    G: Array,
    *,
    lr: float,
    beta: float = 0.9,
    nesterov: bool = True,
    radius: float,
    scale: float,
    tangent: str = "solve",
    factor: Callable[[Array], Array] = polar_factor,
) -> tuple[Array, Array]:
    """Algorithm 1 of arXiv 2601.08393 with hard retraction: new weight and new momentum."""
    buffer = beta * buffer + (1 - beta) * G
    N = (1 - beta) * G + beta * buffer if nesterov else buffer
    M = N / np.linalg.norm(N)
    sigma, u, v = top_triplet(W)
    W = W * (radius / sigma)
    Theta = np.outer(u, v)
    lam = tangent_root(M, Theta, factor) if tangent == "solve" else 0.0
    Phi = factor(M + lam * Theta)
    if tangent == "project":
        Phi = Phi - np.sum(Theta * Phi) * Theta
    return W - lr * scale * Phi, buffer
