"""``msign`` along the line ``M + lam u v^T``, and its inner product with the line's direction.

SSO's search for lambda evaluates it (arXiv 2601.08393, Algorithm 1): ``h(lam) = <u v^T,
msign(M + lam u v^T)>``. Along the line the Gram matrix changes by rank two, so that trials need products
of the short side's size alone, and matrices whose rows are cut over ranks one sum for all of them. A
whole matrix's accepted trial is an ordinary ``msign``.
"""

from functools import cached_property

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import (
    AllReduce,
    divide_,
    frobenius_norm,
    gram_polynomial,
    gram_polynomial_times,
    msign_of_unit,
    times,
    times_thin,
)
from sso_megatron.linalg.power_iteration import TopSingular
from sso_megatron.linalg.symmetric import PLAIN, Products


class WholeFactor:
    """``Phi = msign(Z)`` of whole matrices ``Z = M + lam u v^T``; ``H = Z^T Phi`` with the long side first.

    Attributes:
        u: ``(b, p)`` the direction's vector on the long side.
        v: ``(b, q)`` that on the short side.
        w: ``(b, q)``, ``Phi^T u``.
        u_square: ``(b,)``, ``u^T u``.
    """

    def __init__(self, Z: Tensor, Phi: Tensor, top: TopSingular) -> None:
        """Take ``(b, m, n)`` matrices and their direction."""
        self._is_tall = Z.size(-2) >= Z.size(-1)
        self._Z, self._Phi = (Z, Phi) if self._is_tall else (Z.mT, Phi.mT)
        self.u, self.v = (top.u, top.v) if self._is_tall else (top.v, top.u)
        self.w = times(self._Phi.mT, self.u)
        self.u_square = self.u.square().sum(dim=-1)

    @property
    def mean(self) -> Tensor:
        """Mean singular value of ``Z``, ``(b,)``."""
        return torch.linalg.vecdot(self._Z, self._Phi).sum(dim=-1) / self._Z.size(-1)

    @property
    def nuclear_rank(self) -> Tensor:
        """``||Z||_*^2 / ||Z||_F^2``, ``(b,)``; 0 of a zero matrix. Before ``changed``."""
        return (self.mean * self._Z.size(-1)).square()  # Z is of Frobenius norm 1

    def times_h(self, X: Tensor) -> Tensor:
        """``H X`` for ``(b, q, k)``."""
        return times_thin(self._Z.mT, times_thin(self._Phi, X))

    def times_gram(self, X: Tensor) -> Tensor:
        """``Phi^T Phi X`` for ``(b, q, k)``."""
        return times_thin(self._Phi.mT, times_thin(self._Phi, X))

    def image(self, X: Tensor) -> Tensor:
        """``Phi X`` ``(b, p, k)`` for ``(b, q, k)``."""
        return times_thin(self._Phi, X)

    def matrix(self) -> Tensor:
        """``Phi`` itself, ``(b, m, n)``."""
        return self._Phi if self._is_tall else self._Phi.mT

    def changed(self, left: Tensor, right: Tensor) -> Tensor:
        """``Phi + left right^T`` ``(b, m, n)`` for ``(b, p, k)`` and ``(b, q, k)``; in Phi's memory."""
        self._Phi.baddbmm_(left, right.mT)
        return self.matrix()


class CutFactor:
    """``Phi = msign(Z) = Z Q`` of matrices whose rows are cut; attributes as ``WholeFactor``'s.

    The rows are the long side. Everything but ``image`` and ``changed`` is of the
    uncut side's size and the same on every rank.
    """

    def __init__(self, Z: Tensor, R: Tensor, Q: Tensor, u: Tensor, line: "GramLine", x: Tensor) -> None:
        """Take this rank's rows ``Z`` and ``u``, ``R = Z^T Z``, the polynomial ``Q``, and ``x = Z^T u``."""
        self._Z, self._R, self._Q = Z, R, Q
        self.u, self.v, self.u_square = u, line.v, line.c[:, 0]
        self.w = times(Q, x)

    @property
    def mean(self) -> Tensor:
        """Mean singular value of ``Z``, ``(b,)``."""
        return torch.linalg.vecdot(self._R, self._Q).sum(dim=-1) / self._R.size(-1)

    @property
    def nuclear_rank(self) -> Tensor:
        """``||Z||_*^2 / ||Z||_F^2``, ``(b,)``; 0 of a zero matrix."""
        square = self._R.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        return (self.mean * self._R.size(-1)).square() / square.clamp_min(torch.finfo(torch.float32).tiny)

    def times_h(self, X: Tensor) -> Tensor:
        """``H X`` for ``(b, q, k)``."""
        return times_thin(self._R, times_thin(self._Q, X))

    def times_gram(self, X: Tensor) -> Tensor:
        """``Phi^T Phi X`` for ``(b, q, k)``."""
        return times_thin(self._Q, self.times_h(X))

    def image(self, X: Tensor) -> Tensor:
        """This rank's rows of ``Phi X`` for ``(b, q, k)``."""
        return times_thin(self._Z, times_thin(self._Q, X))

    def matrix(self) -> Tensor:
        """This rank's rows of ``Phi``."""
        return self._Z @ self._Q

    def changed(self, left: Tensor, right: Tensor) -> Tensor:
        """This rank's rows of ``Phi + left right^T`` for ``(b, p, k)`` and ``(b, q, k)``."""
        return self.matrix().baddbmm_(left, right.mT)


PolarFactor = WholeFactor | CutFactor


class GramLine:
    """The Gram matrix ``Z^T Z`` of ``Z = M + lam u v^T`` along the line: a rank-two change of ``M^T M``.

    With ``a = M^T u`` and ``c = u^T u`` it is ``M^T M + lam (a v^T + v a^T) + lam^2 c v v^T``, and
    ``h(lam) = (a + lam c v)^T Q v`` for ``msign(Z) = Z Q``: no trial touches the long side.
    """

    def __init__(self, gram: Tensor, a: Tensor, c: Tensor, v: Tensor) -> None:
        """Take ``M^T M`` ``(b, q, q)``, ``a`` and ``v`` ``(b, q)``, and ``c`` ``(b, 1)``."""
        self.gram, self.a, self.c, self.v = gram, a, c, v

    def of(self, rows: Tensor | None) -> "GramLine":
        """That of some members, ``(k,)`` indices, or of all."""
        if rows is None:
            return self
        return GramLine(*(x[rows] for x in (self.gram, self.a, self.c, self.v)))

    @property
    def along(self) -> Tensor:
        """``u^T M v``, ``(b,)``: a momentum along the direction alone is cancelled at minus that."""
        return (self.a * self.v).sum(dim=-1)

    def at(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``R = Z^T Z / ||Z||_F^2``, ``x = Z^T u`` and ``||Z||_F`` at ``lam``."""
        lam = lam.to(self.gram.dtype)[:, None]
        x = self.a + lam * self.c * self.v
        cross = (lam * (self.a + x) / 2).unsqueeze(-1) * self.v.unsqueeze(-2)
        R = self.gram + cross + cross.mT
        square = R.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return R / square[:, None, None], x, square.sqrt()

    def measure(self, lam: Tensor, coefficients: Coefficients) -> Tensor:
        """``h(lam)`` ``(b,)`` with these Newton-Schulz steps, as exact as the Gram matrix."""
        R, x, norm = self.at(lam)
        return ((x * gram_polynomial_times(R, self.v, coefficients)).sum(dim=-1) / norm).to(lam.dtype)


class WholeLine:
    """The line for whole matrices, which works in the memory of ``M``; ``factor`` comes last.

    It is measured from the point of it that is orthogonal to ``u v^T``: where ``lam u v^T`` cancels nearly
    all of ``M``, a Gram matrix of ``M`` itself keeps nothing of the rest in float32.
    """

    def __init__(
        self, M: Tensor, top: TopSingular, coefficients: Coefficients, products: Products = PLAIN
    ) -> None:
        """Take the line from ``M`` along ``u v^T``.

        Args:
            M: ``(b, m, n)`` of Frobenius norm 1, or 0; float32 or float64. It is overwritten.
            top: ``u`` ``(b, m)`` and ``v`` ``(b, n)``, the line's direction.
            coefficients: one ``(a, b, c)`` a Newton-Schulz step.
            products: how those of ``msign`` are made; all others are in M's dtype.
        """
        self._M, self._top, self._coefficients, self._products = M, top, coefficients, products

    @cached_property
    def along(self) -> Tensor:
        """``u^T M v``, ``(b,)``: a momentum along the direction alone is cancelled at minus that."""
        return (self._top.u * times(self._M, self._top.v)).sum(dim=-1)

    @cached_property
    def _centre(self) -> Tensor:
        """``M - along u v^T``, in the memory of ``M``."""
        return add_rank_one_(self._M, -self.along, self._top.u, self._top.v)

    @cached_property
    def _gram_line(self) -> GramLine:
        """Gram matrices along the line, from its centre."""
        M, u, v = self._centre, self._top.u, self._top.v
        if M.size(-2) < M.size(-1):
            M, u, v = M.mT, v, u
        return GramLine(M.mT @ M, times(M.mT, u), u.square().sum(dim=-1, keepdim=True), v)

    def measure(self, lam: Tensor) -> Tensor:
        """``h(lam)`` ``(b,)`` before ``factor``, to 6e-3 in the median: enough to find the next trial.

        With fewer steps, on one Gram matrix; measured on recorded steps of a GPT, where it is off by
        3e-2 at worst.
        """
        return self._gram_line.measure(lam + self.along, _fewer(self._coefficients))

    def measure_fully(self, lam: Tensor) -> Tensor:
        """``h(lam)`` ``(b,)`` before ``factor``, by ``msign``; half of the batch at a time, for memory."""
        size, step = lam.size(0), max(1, lam.size(0) // 2)
        parts = [slice(start, start + step) for start in range(0, size, step)]
        return torch.cat([lam[:0], *(self.evaluate(lam[part], part)[0] for part in parts)])

    def evaluate(self, lam: Tensor, rows: Tensor | slice | None = None) -> tuple[Tensor, Tensor]:
        """``h(lam)`` ``(k,)`` and ``msign`` ``(k, m, n)`` of the batch's members ``rows`` (all)."""
        M, u, v, along = self._centre, self._top.u, self._top.v, self.along
        if rows is not None:
            M, u, v, along = M[rows], u[rows], v[rows], along[rows]
        Z = add_rank_one(M, lam + along, u, v)
        Phi = msign_of_unit(divide_(Z, frobenius_norm(Z)), self._coefficients, self._products)
        return (u * times(Phi, v)).sum(dim=-1), Phi

    def accept(self, lam: Tensor, Phi: Tensor) -> Tensor:
        """``msign`` at ``lam`` from what ``evaluate`` gave there."""
        return Phi

    def factor(self, lam: Tensor | None = None) -> WholeFactor:
        """``msign`` at ``lam``, or of ``M`` as it came if ``lam`` is left out; once."""
        Z, top = self._M, self._top
        if lam is not None:
            Z = add_rank_one_(self._centre, lam + self.along, top.u, top.v)
            divide_(Z, torch.linalg.vector_norm(Z, dim=(-2, -1)))
        return WholeFactor(Z, msign_of_unit(Z, self._coefficients, self._products), top)


class CutLine:
    """The line for matrices whose rows are cut: all on Gram matrices.

    In float64, since a Gram matrix squares the condition: in float32, ``msign`` from one Gram matrix errs
    by 1e-2 on ill-conditioned momenta and ``h`` by 1e-3; in float64 both are as exact as float32 on whole
    matrices. ``u^T u`` is 1 to rounding, and counts where ``lam u v^T`` cancels nearly all of ``M``.

    Collectives: one sum of ``(b, n + 1)`` float64 numbers at construction.
    """

    def __init__(
        self,
        M: Tensor,
        gram: Tensor,
        top: TopSingular,
        coefficients: Coefficients,
        all_reduce: AllReduce,
    ) -> None:
        """Take the line from ``M`` along ``u v^T``.

        Args:
            M: ``(b, rows, n)`` float64, this rank's rows; of Frobenius norm 1, or 0, on all ranks together.
            gram: ``(b, n, n)`` float64, ``M^T M`` of all rows.
            top: ``u`` ``(b, rows)``, ``v`` ``(b, n)``.
            coefficients: one ``(a, b, c)`` a Newton-Schulz step.
            all_reduce: sum over the ranks that hold the other rows.
        """
        self._M, self._coefficients = M, coefficients
        self._u, v = top.u.double(), top.v.double()
        sums = all_reduce(
            torch.cat([times(M.mT, self._u), self._u.square().sum(dim=-1, keepdim=True)], dim=-1)
        )
        self._gram_line = GramLine(gram, sums[:, :-1], sums[:, -1:], v)

    @property
    def along(self) -> Tensor:
        """See ``GramLine``."""
        return self._gram_line.along

    def measure(self, lam: Tensor) -> Tensor:
        """``h(lam)`` ``(b,)``, with fewer steps."""
        return self._gram_line.measure(lam, _fewer(self._coefficients))

    def measure_fully(self, lam: Tensor) -> Tensor:
        """``h(lam)`` ``(b,)``."""
        return self._gram_line.measure(lam, self._coefficients)

    def evaluate(self, lam: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``h(lam)`` ``(k,)`` and ``Q`` ``(k, n, n)`` float64 of the batch's members ``rows`` (all)."""
        line = self._gram_line.of(rows)
        _, x, Q = self._polynomial(line, lam)
        return (x * times(Q, line.v)).sum(dim=-1).to(lam.dtype), Q

    def _polynomial(self, line: GramLine, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``Z^T Z``, ``Z^T u``, and ``Q`` with ``msign(Z) = Z Q``."""
        R, x, norm = line.at(lam)
        Q = gram_polynomial(R, self._coefficients) / norm[:, None, None]
        return R * norm.square()[:, None, None], x, Q

    def accept(self, lam: Tensor, Q: Tensor) -> Tensor:
        """This rank's rows of ``msign`` at ``lam`` from what ``evaluate`` gave there."""
        return self._rows_at(lam) @ Q

    def factor(self, lam: Tensor | None = None) -> CutFactor:
        """``msign`` at ``lam`` (0 if it is left out) with what its tangent correction asks for."""
        lam = torch.zeros_like(self._u[:, 0]) if lam is None else lam
        R, x, Q = self._polynomial(self._gram_line, lam)
        return CutFactor(self._rows_at(lam), R, Q, self._u, self._gram_line, x)

    def _rows_at(self, lam: Tensor) -> Tensor:
        return add_rank_one(self._M, lam.double(), self._u, self._gram_line.v)


PolarLine = WholeLine | CutLine


def num_measured_steps(num_steps: int) -> int:
    """Newton-Schulz steps of a line's ``measure``, of ``num_steps`` of a whole ``msign``."""
    return min(num_steps, max(5, num_steps - 3))


def _fewer(coefficients: Coefficients) -> Coefficients:
    return coefficients[: num_measured_steps(len(coefficients))]


def add_rank_one(X: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``X + weight u v^T`` of ``(b, m, n)``, ``(b,)``, ``(b, m)`` and ``(b, n)``."""
    return torch.baddbmm(X, (weight[:, None] * u).unsqueeze(-1), v.unsqueeze(-2))


def add_rank_one_(X: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """As ``add_rank_one``, in place."""
    return X.baddbmm_((weight[:, None] * u).unsqueeze(-1), v.unsqueeze(-2))
