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


def spectra_step(
    W: Array,
    buffer: Array,
    V: Array | None,
    G: Array,
    *,
    lr: float,
    rank: int,
    mu: float = 0.95,
    nesterov: bool = False,
    passes: int = 1,
    update_rms: float = 0.2,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Array, Array, Array]:
    """arXiv 2602.11185 with cached power iteration by Householder QR: new weight, momentum and V.

    Without V, at the first step, the momentum's right singular vectors by exact SVD.
    """
    buffer = mu * buffer + G
    M = G + mu * buffer if nesterov else buffer
    if V is None:
        V = np.linalg.svd(M, full_matrices=False)[2][:rank].T
    for _ in range(passes):
        U = np.linalg.qr(M @ V)[0]
        Y = M.T @ U
        s = np.linalg.norm(Y, axis=0)
        V = Y / (s + eps)
    tail = M - (U * s) @ V.T
    tail_rms = np.linalg.norm(tail) / np.sqrt(min(M.shape) - rank)
    O = tail + tail_rms * (U @ V.T)  # noqa: E741
    rms = np.linalg.norm(O) / np.sqrt(O.size)
    return (1 - lr * weight_decay) * W - update_rms * lr / (rms + eps) * O, buffer, V


def suppressed_spike(M: Array, rank: int) -> Array:
    """M with its largest singular values replaced by the root mean square of the others, by exact SVD."""
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    S[:rank] = np.sqrt(np.mean(S[rank:] ** 2))
    return (U * S) @ Vt


class SpectralAdamOracle:
    """SpectralAdam on one matrix with a warm-started power iteration of one product pair a step."""

    def __init__(self, W: Array, start: Array, **settings: float) -> None:
        defaults = {"high": 1.5, "low": 0.67, "period": 50, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        self.settings = defaults | settings
        self.W, self.v, self.t, self.last = W, start, 0, 0.0
        self.mean, self.square = np.zeros_like(W), np.zeros_like(W)

    def step(self, G: Array, lr: float, weight_decay: float = 0.0) -> bool:
        """Whether the gradient was divided."""
        c = self.settings
        self.t += 1
        u = G @ self.v
        self.v = G.T @ (u / np.linalg.norm(u))
        sigma = float(np.linalg.norm(self.v))
        self.v = self.v / sigma
        norm = float(np.linalg.norm(G))
        ratio, self.last = norm / (self.last + c["eps"]), norm
        divided = ratio > c["high"] or ratio < c["low"] or self.t % c["period"] == 0
        if divided:
            G = G / sigma
        self.mean = c["beta1"] * self.mean + (1 - c["beta1"]) * G
        self.square = c["beta2"] * self.square + (1 - c["beta2"]) * G**2
        mean = self.mean / (1 - c["beta1"] ** self.t)
        square = self.square / (1 - c["beta2"] ** self.t)
        self.W = (1 - lr * weight_decay) * self.W - lr * mean / (np.sqrt(square) + c["eps"])
        return divided


def clipped(X: Array, c: float) -> Array:
    """Soft spectral clipping by exact SVD: s -> s / sqrt(1 + s^2 / c^2)."""
    U, S, Vt = np.linalg.svd(X, full_matrices=False)
    return (U * (S / np.sqrt(1 + (S / c) ** 2))) @ Vt


def clipped_as_published(X: Array, c: float, num_steps: int = 10) -> Array:
    """The published iteration for it, in float64 (theirs is in bfloat16): arXiv 2603.14315."""
    if X.shape[0] > X.shape[1]:
        return clipped_as_published(X.T, c, num_steps).T
    S, identity = X @ X.T, np.eye(len(X))
    bound = 1 + min(np.abs(S).sum(axis=1).max(), np.linalg.norm(S)) / c**2
    Y, Z = (identity + S / c**2) / bound, identity
    for _ in range(num_steps):
        T = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Z / np.sqrt(bound) @ X


class ClippedOptimizer:
    """SPECTRA on one parameter: an elementwise optimizer, its direction clipped by exact SVD."""

    def __init__(self, W: Array, base: str, **settings: float) -> None:
        self.W, self.base, self.count = W, base, 0
        self.settings = {
            "beta1": 0.9, "beta2": 0.95 if base == "adamw" else 0.999, "beta3": 0.999, "alpha": 8.0,
            "warmup": 50, "eps": 1e-8, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1,
        } | settings  # fmt: skip
        self.fast, self.slow, self.square = (np.zeros_like(W) for _ in range(3))

    def direction(self, G: Array) -> Array:
        s = self.settings
        self.count += 1
        if self.base == "signum":
            self.fast = s["momentum"] * self.fast + (1 - s["momentum"]) * G
            ahead = (1 - s["momentum"]) * G + s["momentum"] * self.fast
            return np.sign(ahead if s["nesterov"] else self.fast)
        self.fast = s["beta1"] * self.fast + (1 - s["beta1"]) * G
        self.square = s["beta2"] * self.square + (1 - s["beta2"]) * G**2
        mean = self.fast / (1 - s["beta1"] ** self.count)
        root = np.sqrt(self.square / (1 - s["beta2"] ** self.count)) + s["eps"]
        if self.base == "adamw":
            return mean / root
        # As the paper's code has it: half-lives less one, interpolated.
        share = min(self.count / s["warmup"], 1.0)
        start, end = (np.log(0.5) / np.log(beta) - 1 for beta in (s["beta1"], s["beta3"]))
        beta3 = 0.5 ** (1 / ((1 - share) * start + share * end + 1))
        self.slow = beta3 * self.slow + (1 - beta3) * G
        return (mean + share * s["alpha"] * self.slow) / root

    def step(self, G: Array, lr: float, c: float) -> None:
        U = self.direction(G)
        alpha = max(1.0, self.W.shape[0] / self.W.shape[1]) ** 0.5
        self.W = (1 - lr * self.settings["weight_decay"]) * self.W - lr * alpha * clipped(U, c)
