"""The polar factor ``msign(X) = U V^T`` of ``X = U S V^T`` by a Newton-Schulz iteration.

Matrices may be cut along their rows over several ranks. The functions then take ``total``, which adds
a tensor up over those ranks: products that contract the cut dimension go through it, everything else
is local. Without ``total`` matrices are whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients

Total = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks that hold the other rows; every rank gets the same result."""


def frobenius_norm(X: Tensor, total: Total | None = None) -> Tensor:
    """``||X||_F`` of each matrix of a batch, ``(b,)`` float64.

    Summed in float64, where squares of float32 numbers neither over- nor underflow.

    Args:
        X: ``(b, m, n)``, floating point.
        total: sum over the ranks that hold the other rows.
    """
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64)
    return norm if total is None else total(norm.square()).sqrt()


def frobenius_normalize(X: Tensor, norm: Tensor | None = None) -> Tensor:
    """``X / ||X||_F`` for each matrix of a batch; a zero matrix stays zero.

    Args:
        X: ``(b, m, n)``, floating point.
        norm: ``(b,)`` from ``frobenius_norm``, where rows are cut or it is known already.

    Returns:
        A new ``(b, m, n)`` tensor.
    """
    norm = (frobenius_norm(X) if norm is None else norm).clamp_min(torch.finfo(X.dtype).tiny)
    return X / norm.to(X.dtype)[:, None, None]


def msign(X: Tensor, coefficients: Coefficients) -> Tensor:
    """Polar factor of every matrix of a batch (Polar Express form, arXiv 2505.16932).

    Singular values of ``X / ||X||_F`` above the lower bound of the table (1e-3 for polar_express)
    become 1 to the table's accuracy; smaller ones, zero included, stay smaller than 1.

    Args:
        X: ``(b, m, n)`` whole matrices, float32 or float64; half precision is raised to float32.
        coefficients: one ``(a, b, c)`` a step, from ``polar_coefficients``.

    Returns:
        ``(b, m, n)`` in the precision that was worked in.
    """
    if X.dtype not in (torch.float32, torch.float64):
        X = X.float()
    # The Gram matrix is formed on the short side: m^2 n flops instead of n^2 m.
    tall = X.size(-2) > X.size(-1)
    Y = frobenius_normalize(X.mT if tall else X)
    for a, b, c in coefficients:
        A = Y @ Y.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Y = torch.baddbmm(Y, B, Y, beta=a, alpha=1.0)
    return Y.mT if tall else Y


def gram_polynomial(R: Tensor, coefficients: Coefficients) -> Tensor:
    """``Q`` with ``X Q = msign(X)`` for any ``X`` of Gram matrix ``R = X^T X``.

    The Newton-Schulz iteration in terms of the Gram matrix alone: one step multiplies ``Q`` by
    ``P = a I + b R + c R^2`` and makes ``R`` into ``P R P``; all of them commute.

    Args:
        R: ``(b, n, n)``, symmetric, its trace at most 1. In float32 its rounding drowns singular values
            of ``X`` below 3e-4; in float64 below 1e-8.
        coefficients: one ``(a, b, c)`` a step.

    Returns:
        ``(b, n, n)``, symmetric.
    """
    Q = R
    last = len(coefficients) - 1
    for step, (a, b, c) in enumerate(coefficients):
        P = torch.baddbmm(R, R, R, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if step == 0 else Q @ P
        if step < last:
            R = P @ R @ P
            R = (R + R.mT) / 2  # what rounding breaks of the symmetry would grow
    return Q
