"""How good an update of SSO is, in float64 by SVD; a probe that measures it in a training run."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.updates import sso

# Singular values below this part of the largest are zero in float64.
_ZERO = 1e-12


class Line:
    """``M + lam u v^T`` of a batch in float64, with no more rows than it needs."""

    def __init__(self, M: Tensor, u: Tensor, v: Tensor) -> None:
        M, u, v = (M, u, v) if M.size(-2) >= M.size(-1) else (M.mT, v, u)
        self.M, self.u, self.v = M, u[..., None], v[..., None]
        if M.size(-2) > M.size(-1) + 1:  # a rotation of the rows changes nothing that is asked for
            R = torch.linalg.qr(torch.cat([M, self.u], dim=-1)).R
            self.M, self.u = R[..., :-1], R[..., -1:]

    def svd(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Z = self.M + lam[:, None, None] * self.u @ self.v.mT
        U, S, Vt = torch.linalg.svd(Z, full_matrices=False)
        floor = _ZERO * S[:, :1]
        return U, torch.where(floor < S, S, 0.0), Vt

    def h(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """``<u v^T, polar factor>``, and the sum of the singular values, whose derivative it is."""
        U, S, Vt = self.svd(lam)
        ends = (U.mT @ self.u)[..., 0] * (Vt @ self.v)[..., 0]
        return (ends * (S > 0)).sum(dim=-1), S.sum(dim=-1)

    def lost_by_polynomial(self, lam: Tensor, coefficients: Coefficients) -> Tensor:
        """``<M, polar factor - Newton-Schulz>`` at ``lam``, both on exact singular values."""
        U, S, Vt = self.svd(lam)
        x = S / torch.linalg.vector_norm(S, dim=-1, keepdim=True)
        for a, b, c in coefficients:
            x = a * x + b * x**3 + c * x**5
        gain = (U.mT @ self.M @ Vt.mT).diagonal(dim1=-2, dim2=-1)
        return (gain * (1 - x) * (S > 0)).sum(dim=-1)


def exact_root(line: Line, start: Tensor) -> tuple[Tensor, Tensor]:
    """``lam*`` and the best objective of all tangent steps, ``min ||M + lam u v^T||_*``.

    By duality no ``Phi`` with ``||Phi|| <= 1`` and ``<u v^T, Phi> = 0`` has a larger ``<M, Phi>`` than
    the sum of singular values at any ``lam``; so an inexact root here can only make a loss look larger.
    """
    low, high = start - 0.01, start + 0.01
    (at_low, _), (at_high, best) = line.h(low), line.h(high)
    while (at_low > 0).any() or (at_high < 0).any():
        width = 2 * (high - low)
        low, high = torch.where(at_low > 0, low - width, low), torch.where(at_high < 0, high + width, high)
        (at_low, _), (at_high, _) = line.h(low), line.h(high)
    for number in range(90):
        # False position, which is fast, and halving, which is sure.
        part = torch.full_like(low, 0.5) if number % 3 == 2 else at_low / (at_low - at_high)
        lam = torch.where(part.isnan(), low, low + part * (high - low))
        value, objective = line.h(lam)
        best = torch.minimum(best, objective)
        is_low = value < 0
        low, at_low = torch.where(is_low, lam, low), torch.where(is_low, value, at_low)
        high, at_high = torch.where(is_low, high, lam), torch.where(is_low, at_high, value)
        if ((value.abs() < 1e-7) | (high - low < 1e-12)).all():
            return lam, best
    raise AssertionError(f"no root after 90 trials: {value}")


def judge(
    M: Tensor, u: Tensor, v: Tensor, Phi: Tensor, lam: Tensor, rule: sso.SSORule
) -> dict[str, Tensor]:
    """Figures ``(b,)`` of a direction: all arguments float64, ``M`` of Frobenius norm 1.

    ``lost`` is the part of the best objective that the direction has not, without ``lost_by_msign``:
    what the polynomial itself loses against the polar factor at the same ``lam``. ``smallest`` is the
    smallest singular value of ``Z = M + lam u v^T``, by ``||Z||_F``.
    """
    line = Line(M, u, v)
    _, S, _ = line.svd(lam)
    best_lam, best = exact_root(line, lam)
    by_msign = line.lost_by_polynomial(lam, rule.coefficients) / best
    return {
        "residual": (u[:, None] @ Phi @ v[..., None])[:, 0, 0].abs(),
        "lost": 1 - (M * Phi).sum(dim=(-2, -1)) / best - by_msign,
        "lost_by_msign": by_msign,
        "norm": torch.linalg.svdvals(Phi)[:, 0],
        "smallest": S[:, -1] / torch.linalg.vector_norm(S, dim=-1),
        "best_lam": best_lam,
    }


@contextmanager
def retractions() -> Any:
    """Lists the triplet and the retracted weight of each call of the step's retraction."""
    original, seen = sso.retract_to_spectral_sphere_, []

    def retract(W: Tensor, *args: Any, **kwargs: Any) -> Any:
        top = original(W, *args, **kwargs)
        seen.append((top, W.clone()))
        return top

    sso.retract_to_spectral_sphere_ = retract
    try:
        yield seen
    finally:
        sso.retract_to_spectral_sphere_ = original


def judged_step(
    step: Callable[..., sso.SSOStats], W: Tensor, N: Tensor, cache: sso.SpectralCache, **kwargs: Any
) -> tuple[sso.SSOStats, dict[str, Tensor]]:
    """One ``sso_step_``, in place as ever, and the figures of its update."""
    M = N.double()
    M = M / torch.linalg.matrix_norm(M, keepdim=True)
    with retractions() as seen:
        stats = step(W, N, cache, **kwargs)
    ((top, retracted),) = seen
    factor = torch.as_tensor(kwargs["lr"] * kwargs["scale"], dtype=torch.float64).reshape(-1, 1, 1)
    Phi = (retracted.double() - W.double()) / factor
    figures = judge(M, top.u.double(), top.v.double(), Phi, stats.lam.double(), kwargs["rule"])
    figures |= {"lam": stats.lam, "h": stats.residual, "trials": stats.num_trials}
    return stats, {name: figure.double() for name, figure in figures.items()}


def record() -> None:
    """Save the figures of every 25th step (``QUALITY_EVERY``) of a one-rank run, one entry an update.

    It starts with the second: the first of a warmup has a learning rate of 0.
    """
    from helpers.probes import around_train, save
    from sso_megatron.optimizers import sso as optimizer

    every = int(os.environ.get("QUALITY_EVERY", "25"))
    step, rows = optimizer.sso_step_, []
    calls: Counter[int] = Counter()

    def watched(W: Tensor, N: Tensor, cache: sso.SpectralCache, **kwargs: Any) -> sso.SSOStats:
        number = calls[id(cache)]
        calls[id(cache)] += 1
        if number % every != 1:
            return step(W, N, cache, **kwargs)
        stats, figures = judged_step(step, W, N, cache, **kwargs)
        rows.append(figures | {"step": torch.full_like(figures["lam"], number)})
        return stats

    def after(model: Any, optimizers: Any) -> None:
        save("quality", {name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    optimizer.sso_step_ = watched
    around_train(None, after)
