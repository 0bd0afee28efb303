"""``msign`` along the line ``M + lam u v^T``, and its inner product with the line's direction.

What SSO's search for lambda evaluates: ``h(lam) = <u v^T, msign(M + lam u v^T)>``. Whole matrices
run the Newton-Schulz iteration anew for each trial. Matrices whose rows are cut over ranks use that
the Gram matrix changes along the line by rank two, so that all trials and the accepted one together
need one sum over the ranks.
"""

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import Total, gram_polynomial, msign
from sso_megatron.linalg.power_iteration import TopSingular

Trial = tuple[Tensor, Tensor]
"""``h(lam)`` ``(k,)`` and what came with it ``(k, ...)``."""


class WholeLine:
    """The line for whole matrices; ``extra`` of a trial is its ``msign``."""

    def __init__(self, M: Tensor, top: TopSingular, moves: Tensor, coefficients: Coefficients) -> None:
        """See ``polar_line``."""
        self._M, self._top, self._moves, self._coefficients = M, top, moves, coefficients

    def evaluate(self, lam: Tensor, rows: Tensor | None = None) -> Trial:
        """``h(lam)`` ``(k,)`` and ``msign`` ``(k, m, n)`` of the batch's members ``rows`` (all)."""
        M, u, v, moves = self._M, self._top.u, self._top.v, self._moves
        if rows is not None:
            M, u, v, moves = M[rows], u[rows], v[rows], moves[rows]
        Phi = msign(add_rank_one(M, lam, u, v), self._coefficients) * moves[:, None, None]
        return (u * (Phi @ v.unsqueeze(-1)).squeeze(-1)).sum(dim=-1), Phi

    def accept(self, lam: Tensor, trial: Trial | None) -> Trial:
        """``h`` and ``msign`` at ``lam``: those of the trial, where there was one."""
        return self.evaluate(lam) if trial is None else trial


class CutLine:
    """The line for matrices whose rows are cut; ``extra`` of a trial is the polynomial ``Q``.

    With ``a = M^T u`` and ``c = u^T u`` the Gram matrix at ``lam`` is
    ``M^T M + lam (a v^T + v a^T) + lam^2 c v v^T``, and ``h(lam) = (a + lam c v)^T Q v`` for
    ``msign(Z) = Z Q``: no trial touches the long side. All of it in float64, since a Gram matrix squares
    the condition: in float32, ``msign`` from one Gram matrix errs by 1e-2 on ill-conditioned momenta and
    ``h`` by 1e-3; in float64 both are as exact as float32 on whole matrices. ``c`` is 1 to rounding, and
    counts where ``lam u v^T`` cancels nearly all of ``M``.

    Collectives: one sum of ``(b, n + 1, n + 1)`` float64 numbers at construction.
    """

    def __init__(
        self, M: Tensor, top: TopSingular, moves: Tensor, coefficients: Coefficients, total: Total
    ) -> None:
        """See ``polar_line``."""
        self._M, self._u, self._v = M.double(), top.u.double(), top.v.double()
        self._moves, self._coefficients = moves, coefficients
        both = torch.cat([self._M, self._u.unsqueeze(-1)], dim=-1)
        sums = total(both.mT @ both)
        self._gram, self._a, self._c = sums[..., :-1, :-1], sums[..., :-1, -1], sums[..., -1, -1:]

    def evaluate(self, lam: Tensor, rows: Tensor | None = None) -> Trial:
        """``h(lam)`` ``(k,)`` of the batch's members ``rows`` (all), and ``Q`` ``(k, n, n)`` float64."""
        members = slice(None) if rows is None else rows
        gram, a, v, moves = self._gram[members], self._a[members], self._v[members], self._moves[members]
        shift = lam.double()[:, None]
        shifted = shift * self._c[members]
        cross = (shift * (a + shifted / 2 * v)).unsqueeze(-1) * v.unsqueeze(-2)
        R = gram + cross + cross.mT
        square = R.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        square = square.clamp_min(torch.finfo(lam.dtype).tiny)[:, None, None]
        Q = gram_polynomial(R / square, self._coefficients) * (moves[:, None, None] / square.sqrt())
        h = ((a + shifted * v) * (Q @ v.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)
        return h.to(lam.dtype), Q

    def accept(self, lam: Tensor, trial: Trial | None) -> Trial:
        """``h`` at ``lam``, and this rank's rows of the ``msign`` there, ``(b, m, n)``."""
        h, Q = self.evaluate(lam) if trial is None else trial
        return h, (add_rank_one(self._M, lam.double(), self._u, self._v) @ Q).to(lam.dtype)


PolarLine = WholeLine | CutLine


def polar_line(
    M: Tensor, top: TopSingular, moves: Tensor, coefficients: Coefficients, total: Total | None
) -> PolarLine:
    """The line from ``M`` along ``u v^T``.

    Args:
        M: ``(b, m, n)`` of Frobenius norm 1, or 0; float32 or float64.
        top: ``u`` ``(b, m)`` and ``v`` ``(b, n)``, the line's direction.
        moves: ``(b,)`` bool, False where ``M`` is zero: a zero momentum has no direction, and
            ``msign(lam u v^T)`` would be a step along the weight itself.
        coefficients: one ``(a, b, c)`` a Newton-Schulz step.
        total: sum over the ranks that hold the other rows; None for whole matrices.
    """
    if total is None:
        return WholeLine(M, top, moves, coefficients)
    return CutLine(M, top, moves, coefficients, total)


def add_rank_one(X: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``X + weight u v^T`` of ``(b, m, n)``, ``(b,)``, ``(b, m)`` and ``(b, n)``."""
    return torch.baddbmm(X, (weight[:, None] * u).unsqueeze(-1), v.unsqueeze(-2))
