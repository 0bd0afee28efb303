"""Computes the polar factor ``msign(X) = U V^T`` of ``X = U S V^T`` by a Newton-Schulz iteration.

Where matrices are sharded along their rows over several ranks, functions of this package take
``all_reduce``, which sums a tensor over those ranks: products that contract the sharded dimension go
through it, everything else is local. Without ``all_reduce`` matrices are whole.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.symmetric import PLAIN, Products

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that hold the other rows; every rank gets the same result."""

# Measured in float32 on CPU cores, eight steps: at long = 2 short the Gram form takes 0.9 of the ordinary
# form's time, at 3 short 0.7 and at 1.5 short 1.2.
_GRAM_RATIO = 2


def _restarts(precision: str, num_steps: int) -> tuple[int, ...]:
    """Return the numbers of steps after which the Gram form computes a new Gram matrix.

    A Gram matrix squares the condition number. In float32 eight steps on one Gram matrix lose singular
    values below 3e-4 and err by 1e-2. Three steps have lifted those values so far that one more Gram matrix
    is enough for the other steps; the result is as exact as the ordinary form's (with a restart after four
    steps the error is five times larger).

    Below float32 rounding makes small eigenvalues negative, and a step multiplies them by up to 67. At
    equal spectral norm the restarts chosen lose at worst 6e-4 of the objective ``<X, msign(X)>`` in TF32
    and 5e-3 in bfloat16, over eleven spectra, flat and steep, with gaps and spikes, at 2:1 and 8:1; the
    ordinary form loses 6e-4 and 4e-3. A single restart after three steps loses 4e-2 in TF32 and diverges in
    bfloat16, where restarts after 2, 4 and 6 lose 1e-2.
    """
    return (3,) if precision == "fp32" else (2, 4, *range(6, num_steps))


def frobenius_norm(X: Tensor) -> Tensor:
    """Return ``||X||_F`` of each matrix of a batch, ``(b,)`` float64; it neither over- nor underflows.

    Args:
        X: ``(b, m, n)``, floating point.
    """
    # Scaled by the largest entry, because a sum in float64 takes twenty times as long on a CPU.
    largest = torch.linalg.vector_norm(X, ord=torch.inf, dim=(-2, -1), keepdim=True)
    scaled = X / largest.clamp_min(torch.finfo(X.dtype).tiny)
    return torch.linalg.vector_norm(scaled, dim=(-2, -1)).double() * largest[:, 0, 0].double()


def divide_(X: Tensor, norm: Tensor) -> Tensor:
    """Divide ``(b, m, n)`` matrices by ``(b,)`` norms in place; a matrix of norm 0 stays zero."""
    return X.div_(norm.to(X.dtype).clamp_min(torch.finfo(X.dtype).tiny)[:, None, None])


def msign(X: Tensor, coefficients: Coefficients, products: Products = PLAIN) -> Tensor:
    """Return the polar factor of every matrix of a batch (Polar Express form, arXiv 2505.16932).

    Singular values of ``X / ||X||_F`` above the lower bound of the table (1e-3 for polar_express)
    become 1 to the table's accuracy; smaller ones, zero included, stay smaller than 1.

    A long matrix takes the Gram form (``gram_polynomial``), whose products have the size of the short
    side, with a few Gram matrices one after the other.

    Args:
        X: ``(b, m, n)`` whole matrices, float32 or float64; half precision is raised to float32.
        coefficients: one ``(a, b, c)`` a step, from ``polar_coefficients``.
        products: how products of float32 matrices are computed.

    Returns:
        ``(b, m, n)``, float64 for a float64 ``X``, else float32.
    """
    if X.dtype not in (torch.float32, torch.float64):
        X = X.float()
    return msign_of_unit(divide_(X.clone(), frobenius_norm(X)), coefficients, products)


def msign_of_unit(X: Tensor, coefficients: Coefficients, products: Products = PLAIN) -> Tensor:
    """Return the polar factor of matrices of Frobenius norm 1 or 0, without another copy of them.

    Args:
        X: ``(b, m, n)``, float32 or float64; read only.
        coefficients: one ``(a, b, c)`` a step.
        products: how products of float32 matrices are computed.

    Returns:
        ``(b, m, n)``.
    """
    products = products.for_dtype(X.dtype)
    is_tall = X.size(-2) >= X.size(-1)
    # The ordinary form computes a new Gram matrix after every step.
    num_steps = len(coefficients)
    stops = _restarts(products.precision, num_steps) if is_long(X.shape[-2:]) else range(1, num_steps)
    with products.setting():
        Y = products.operand(X if is_tall else X.mT)
        for part in _parts(coefficients, stops):
            a, Q = _polynomial(products.gram(Y), part, products)
            Y = torch.baddbmm(Y, Y, Q, beta=a) if a else Y @ Q
    Y = Y.to(X.dtype)
    return Y if is_tall else Y.mT


def _parts(coefficients: Coefficients, stops: Iterable[int]) -> list[Coefficients]:
    inner = [stop for stop in stops if stop < len(coefficients)]
    return [coefficients[i:j] for i, j in itertools.pairwise([0, *inner, len(coefficients)])]


def is_long(shape: Sequence[int]) -> bool:
    """Return whether ``msign`` takes the Gram form for a matrix of this shape."""
    return max(shape) >= _GRAM_RATIO * min(shape)


def gram_polynomial(R: Tensor, coefficients: Coefficients) -> Tensor:
    """Return ``Q`` with ``X Q = msign(X)`` for any ``X`` that has the Gram matrix ``R = X^T X``.

    This is the Newton-Schulz iteration in terms of the Gram matrix alone: one step multiplies ``Q`` by
    ``P = a I + b R + c R^2`` and replaces ``R`` by ``P R P``; all of these matrices commute.

    Args:
        R: ``(b, n, n)``, symmetric, its trace at most 1. In float32 its rounding hides singular values
            of ``X`` below 3e-4; in float64 below 1e-8.
        coefficients: one ``(a, b, c)`` a step.

    Returns:
        ``(b, n, n)``, symmetric.
    """
    return _polynomial(R, coefficients, PLAIN)[1]


def _polynomial(R: Tensor, coefficients: Coefficients, products: Products) -> tuple[float, Tensor]:
    """Return ``(a, Q)`` with ``X (a I + Q) = msign(X)``, where ``a`` is 0 in full precision.

    The iteration is described at ``gram_polynomial``.
    """
    scale, Q = 0.0, R
    for step, (a, b, c) in enumerate(coefficients):
        a, Z = _step_polynomial(R, a, b, c, products)
        if step == 0:
            scale, Q = a, Z
        else:  # (scale + Q) (a + Z)
            Q = products.symmetric(Q, Z, Q, beta=a)
            Q = Q.add_(Z, alpha=scale) if scale else Q
            scale *= a
        if step + 1 < len(coefficients):
            R = _next_gram(R, a, Z, products)
    return scale, Q


def gram_polynomial_times(R: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
    """Return ``Q x`` for ``Q = gram_polynomial(R, coefficients)``.

    A step takes three products of ``(n, n)`` matrices, the last step none.

    Args:
        R: ``(b, n, n)``, symmetric, its trace at most 1.
        x: ``(b, n)``.
        coefficients: one ``(a, b, c)`` a step.
    """
    for step, (a, b, c) in enumerate(coefficients):
        image = times(R, x)
        x = a * x + b * image + c * times(R, image)
        if step + 1 < len(coefficients):
            R = _next_gram(R, *_step_polynomial(R, a, b, c, PLAIN), PLAIN)
    return x


def times(A: Tensor, x: Tensor) -> Tensor:
    """Return ``A x`` for each of a batch, ``(b, m, n)`` and ``(b, n)``."""
    return times_thin(A, x.unsqueeze(-1)).squeeze(-1)


def times_thin(A: Tensor, X: Tensor) -> Tensor:
    """Return ``A X`` for each of a batch, ``(b, m, n)`` and few columns ``(b, n, k)``."""
    # Computed as X^T A^T, because CPU libraries take five times as long for few columns as for few rows.
    return (X.mT @ A.mT).mT


def _step_polynomial(R: Tensor, a: float, b: float, c: float, products: Products) -> tuple[float, Tensor]:
    """Return ``(s, Z)`` with ``s I + Z = a I + b R + c R^2``.

    In full precision ``s`` is 0 and ``a`` is in ``Z``. In lower precision ``a`` on the diagonal would
    round away the small entries that carry small singular values. Kept apart from them, as ``s``, it costs
    another pass over a matrix in each product.
    """
    Z = products.symmetric(R, R, R, beta=b, alpha=c)
    if products.precision != "fp32":
        return a, Z
    Z.diagonal(dim1=-2, dim2=-1).add_(a)
    return 0.0, Z


def _next_gram(R: Tensor, a: float, Z: Tensor, products: Products) -> Tensor:
    """Return ``P R P`` for ``P = a I + Z``."""
    T = products.symmetric(Z, R, R, beta=a)
    R = products.symmetric(T, Z, T, beta=a)
    # In float64 a caller may take all steps on one Gram matrix, where lost symmetry would grow.
    return (R + R.mT) / 2 if R.dtype == torch.float64 else R
