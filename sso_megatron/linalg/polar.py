"""The polar factor ``msign(X) = U V^T`` of ``X = U S V^T`` by a Newton-Schulz iteration.

Where matrices are cut along their rows over several ranks, functions of this package take ``total``,
which adds a tensor up over those ranks: products that contract the cut dimension go through it,
everything else is local. Without ``total`` matrices are whole.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients

Total = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks that hold the other rows; every rank gets the same result."""

# Newton-Schulz steps on the first Gram matrix in float32. It squares the condition: eight steps on it lose
# singular values below 3e-4 and err by 1e-2. Three steps have lifted those so far that the rest can go on
# one more Gram matrix; the result is as exact as the ordinary form's (four steps: five times worse).
_STEPS_ON_FIRST_GRAM = 3
# Measured in float32 on CPU cores, eight steps: at long = 2 short the Gram form takes 0.9 of the ordinary
# form's time, at 3 short 0.7 and at 1.5 short 1.2.
_GRAM_RATIO = 2


def frobenius_norm(X: Tensor) -> Tensor:
    """``||X||_F`` of each matrix of a batch, ``(b,)`` float64, which neither over- nor underflows.

    Args:
        X: ``(b, m, n)``, floating point.
    """
    # By the largest entry: a sum in float64 takes twenty times as long on a CPU.
    largest = torch.linalg.vector_norm(X, ord=torch.inf, dim=(-2, -1), keepdim=True)
    scaled = X / largest.clamp_min(torch.finfo(X.dtype).tiny)
    return torch.linalg.vector_norm(scaled, dim=(-2, -1)).double() * largest[:, 0, 0].double()


def divide_(X: Tensor, norm: Tensor) -> Tensor:
    """``X / norm`` of ``(b, m, n)`` and ``(b,)`` in place; a matrix of norm 0 stays zero."""
    return X.div_(norm.to(X.dtype).clamp_min(torch.finfo(X.dtype).tiny)[:, None, None])


def msign(X: Tensor, coefficients: Coefficients) -> Tensor:
    """Polar factor of every matrix of a batch (Polar Express form, arXiv 2505.16932).

    Singular values of ``X / ||X||_F`` above the lower bound of the table (1e-3 for polar_express)
    become 1 to the table's accuracy; smaller ones, zero included, stay smaller than 1.

    A long matrix goes by the Gram form (``gram_polynomial``), whose products are of the short side's
    size; after three steps comes a second Gram matrix.

    Args:
        X: ``(b, m, n)`` whole matrices, float32 or float64; half precision is raised to float32.
        coefficients: one ``(a, b, c)`` a step, from ``polar_coefficients``.

    Returns:
        ``(b, m, n)`` in the precision that was worked in.
    """
    if X.dtype not in (torch.float32, torch.float64):
        X = X.float()
    return msign_of_unit(divide_(X.clone(), frobenius_norm(X)), coefficients)


def msign_of_unit(X: Tensor, coefficients: Coefficients) -> Tensor:
    """``msign`` of matrices of Frobenius norm 1, or 0, without another copy of them.

    Args:
        X: ``(b, m, n)``, float32 or float64; read only.
        coefficients: one ``(a, b, c)`` a step.

    Returns:
        ``(b, m, n)``.
    """
    is_tall = X.size(-2) >= X.size(-1)
    Y = X if is_tall else X.mT
    if is_long(X.shape[-2:]):
        for part in (coefficients[:_STEPS_ON_FIRST_GRAM], coefficients[_STEPS_ON_FIRST_GRAM:]):
            Y = Y @ gram_polynomial(Y.mT @ Y, part) if part else Y
    else:
        for a, b, c in coefficients:
            A = Y.mT @ Y
            Y = torch.baddbmm(Y, Y, torch.baddbmm(A, A, A, beta=b, alpha=c), beta=a)
    return Y if is_tall else Y.mT


def is_long(shape: Sequence[int]) -> bool:
    """Whether ``msign`` takes the Gram form for a matrix of this shape."""
    return max(shape) >= _GRAM_RATIO * min(shape)


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
    for step, (a, b, c) in enumerate(coefficients):
        P = _step_polynomial(R, a, b, c)
        Q = P if step == 0 else Q @ P
        if step + 1 < len(coefficients):
            R = _next_gram(P, R)
    return Q


def gram_polynomial_times(R: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
    """``Q x`` for ``Q = gram_polynomial(R, coefficients)``, three products a step and none in the last.

    Args:
        R: ``(b, n, n)``, symmetric, its trace at most 1.
        x: ``(b, n)``.
        coefficients: one ``(a, b, c)`` a step.
    """
    for step, (a, b, c) in enumerate(coefficients):
        image = times(R, x)
        x = a * x + b * image + c * times(R, image)
        if step + 1 < len(coefficients):
            R = _next_gram(_step_polynomial(R, a, b, c), R)
    return x


def times(A: Tensor, x: Tensor) -> Tensor:
    """``A x`` for each of a batch, ``(b, m, n)`` and ``(b, n)``."""
    return times_thin(A, x.unsqueeze(-1)).squeeze(-1)


def times_thin(A: Tensor, X: Tensor) -> Tensor:
    """``A X`` for each of a batch, ``(b, m, n)`` and few columns ``(b, n, k)``."""
    # As X^T A^T: CPU libraries take five times as long for few columns as for few rows.
    return (X.mT @ A.mT).mT


def _step_polynomial(R: Tensor, a: float, b: float, c: float) -> Tensor:
    """``a + b R + c R^2``."""
    P = torch.baddbmm(R, R, R, beta=b, alpha=c)
    P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def _next_gram(P: Tensor, R: Tensor) -> Tensor:
    """``P R P``. In float64 all steps go on one Gram matrix, where lost symmetry would grow."""
    R = P @ R @ P
    return (R + R.mT) / 2 if R.dtype == torch.float64 else R
