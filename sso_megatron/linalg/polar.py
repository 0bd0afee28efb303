"""The polar factor ``msign(X) = U V^T`` of ``X = U S V^T`` by a Newton-Schulz iteration."""

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients


def frobenius_normalize(X: Tensor) -> Tensor:
    """``X / ||X||_F`` for each matrix of a batch; a zero matrix stays zero.

    Args:
        X: ``(b, m, n)``, floating point.

    Returns:
        A new ``(b, m, n)`` tensor. The largest entry is divided out first, so that neither very
        small nor very large entries under- or overflow when they are squared.
    """
    tiny = torch.finfo(X.dtype).tiny
    Y = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    return Y / torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True).clamp_min(tiny)


def msign(X: Tensor, coefficients: Coefficients) -> Tensor:
    """Polar factor of every matrix of a batch (Polar Express form, arXiv 2505.16932).

    Singular values of ``X / ||X||_F`` above the lower bound of the table (1e-3 for polar_express)
    become 1 to the table's accuracy; smaller ones, zero included, stay smaller than 1.

    Args:
        X: ``(b, m, n)``, float32 or float64; half precision is raised to float32.
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
