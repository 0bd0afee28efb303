"""Computes the nuclear norm, the sum of the singular values, as ``||G||_* = <G, msign(G)>``."""

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import AllReduce, divide_, frobenius_norm, gram_polynomial, msign_of_unit
from sso_megatron.linalg.precision import float32_products


@float32_products("ieee")
def norms(
    G: Tensor, coefficients: Coefficients, all_reduce: AllReduce | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``||G||_*`` and ``||G||_F`` of every matrix of a batch, ``(b,)`` float64 each.

    The nuclear norm is too small by the share of singular values that Newton-Schulz steps do not lift to
    1: for eight steps of polar_express, singular values below 1e-3 of the norm.

    Args:
        G: ``(b, m, n)`` float32 or float64, whole matrices or this rank's rows; it is overwritten.
        coefficients: one ``(a, b, c)`` a step.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices. It is called
            twice, with ``(b,)`` and ``(b, n, n)`` float64 numbers.
    """
    size = frobenius_norm(G)
    if all_reduce is not None:
        size = all_reduce(size.square()).sqrt()
    X = divide_(G, size)
    if all_reduce is None:
        # Entry by entry: a product of long vectors would lose digits.
        share = (X * msign_of_unit(X, coefficients)).sum(dim=(-2, -1), dtype=torch.float64)
    else:
        X = X.double()
        gram = all_reduce(X.mT @ X)
        share = (gram * gram_polynomial(gram, coefficients)).sum(dim=(-2, -1))
    return size * share, size
