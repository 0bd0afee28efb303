"""Computes the soft spectral clipping ``H_c(X) = (I + X X^T / c^2)^(-1/2) X`` (arXiv 2603.14315).

Every singular value ``s`` becomes ``s / sqrt(1 + s^2 / c^2)``: small ones keep their size, none reaches
``c``. That is ``c`` times the upper block of ``msign([X; c I])``, so it uses the polynomials of
``linalg.polar`` on the Gram matrix of the short side. The singular values of ``[X; c I]`` are never
smaller than ``c``, so that no table has to lift values that rounding has lost.
"""

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import AllReduce, gram_polynomial
from sso_megatron.linalg.precision import float32_products

# Newton-Schulz steps on the first Gram matrix in float32. Where ||X|| is 1e3 c, all steps on it err by up
# to 1e-2 c, and with a second Gram matrix after these by 1e-4 c; where it is 100 c, by 8e-5 c and 3e-5 c.
_STEPS_ON_FIRST_GRAM = 3
# Clipping aims at c less this many units of rounding. In float32 singular values came out above where
# they should be by at most 1e-5 (||X|| up to 1e4 c, up to 1024 columns).
_MARGIN = 256


@float32_products("ieee")
def spectral_clip(
    X: Tensor, c: Tensor | float, coefficients: Coefficients, all_reduce: AllReduce | None = None
) -> Tensor:
    """Return ``H_c`` of every matrix of a batch; its spectral norm is below ``c``, rounding included.

    Eight steps of polar_express give every singular value to 1e-3 of what it should be while ``||X|| <=
    2400 c``, seven up to 1300 c, and each step beyond eight up to 1.9 times as much. Where ``||X||`` is
    larger, singular values that are small beside it come out too small. Here ``||X||`` means the bound that
    the Gram matrix gives, which is the Frobenius norm where one singular value makes up nearly all of that
    norm, and less elsewhere.

    Args:
        X: ``(b, m, n)`` float32 or float64, whole matrices or this rank's rows; read only.
        c: positive and finite; a number, or a tensor on the device, 0-d or ``(b,)``.
        coefficients: one ``(a, b, c)`` a step, from ``polar_coefficients``, that never exceed 1.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices. It is called once,
            with ``(b, n, n)`` float64 numbers: a second Gram matrix would need a second sum.

    Returns:
        ``(b, m, n)`` in X's dtype.
    """
    limit = _aim(c, X)
    is_tall = all_reduce is not None or X.size(-2) >= X.size(-1)
    Y = (X if all_reduce is None else X.double()) / limit
    Y = Y if is_tall else Y.mT
    R = Y.mT @ Y if all_reduce is None else all_reduce(Y.mT @ Y)
    R.diagonal(dim1=-2, dim2=-1).add_(1)
    # Two bounds of the largest eigenvalue: for the identity the second alone is sharp.
    largest = torch.minimum(torch.linalg.matrix_norm(R), torch.linalg.matrix_norm(R, ord=torch.inf))
    R.div_(largest[:, None, None])
    num_first = _STEPS_ON_FIRST_GRAM if R.dtype == torch.float32 else len(coefficients)
    first, second = coefficients[:num_first], coefficients[num_first:]
    # After these steps the iterate is [Y; I] Z.
    Z = gram_polynomial(R, first).div_(largest.sqrt()[:, None, None])
    Y = Y @ Z
    if second:
        Y = Y @ gram_polynomial(torch.baddbmm(Y.mT @ Y, Z.mT, Z), second)
    H = (Y if is_tall else Y.mT).mul_(limit)
    return H.to(X.dtype)


def _aim(c: Tensor | float, X: Tensor) -> Tensor | float:
    """Return the ``c`` to clip at, less a margin for rounding: a number or ``(b or 1, 1, 1)``."""
    factor = 1 - _MARGIN * torch.finfo(X.dtype).eps
    return c.reshape(-1, 1, 1).to(X.dtype) * factor if isinstance(c, Tensor) else c * factor
