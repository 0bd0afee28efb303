"""Rotation of a polar factor onto the tangent space of a direction, exactly.

``Phi = msign(Z)`` with ``<u v^T, Phi> = h`` not quite zero is to become a ``Phi'`` with zero that is as
good a step: ``||Phi'|| = ||Phi||``, and ``<Z, Phi'>`` as large as may be. Subtracting ``h u v^T`` keeps
neither. A rotation ``Phi' = G Phi`` of the long side keeps the norm; in which plane it costs least
follows from how ``msign`` itself moves with ``lam``. For ``Z = Phi H`` the derivative of
``msign(Z + lam u v^T)`` is a skew matrix times ``Phi`` whose entry between two singular directions of
values ``s_i`` and ``s_j`` has the weight ``1 / (s_i + s_j)``. The skew ``p q^T - q p^T`` with

    p = (Z Phi^T + mu)^-1 u,     q = (Z Phi^T + mu)^-1 Phi v

has ``1 / ((s_i + mu)(s_j + mu))`` there: much the same where it matters, and of rank two. So the rotation
in the plane of ``p`` and ``q`` does what moving ``lam`` to the root would have done, without another
``msign``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sso_megatron.linalg.polar_line import PolarFactor

# mu as a part of the mean singular value, and steps of the conjugate gradients that solve with it.
# Measured on recorded steps of a GPT (hidden 192), |h| up to 0.6: the objective that a rotation loses is
# 3e-6 in the median and 4e-4 at the 99th percentile; with eight steps 1e-6 and 3e-4; with mu 0.03 there are
# planes that cannot take h away.
_SHIFT, _NUM_SOLVE_STEPS = 0.1, 4
# sin^2 of the angle between p and q below which they are no plane in float32: at 1e-6 a momentum along the
# weight itself leaves a residual of 4e-2, at this none.
_MIN_SINE_SQUARE = 1e-3


class TangentRotation(NamedTuple):
    """``Phi' = Phi + left right^T`` with ``<u v^T, Phi'> = 0``.

    Attributes:
        h: ``(b,)`` ``<u v^T, Phi>`` before.
        left: ``(b, p, 3)`` this rank's rows on the long side.
        right: ``(b, q, 3)`` on the short side.
    """

    h: Tensor
    left: Tensor
    right: Tensor


def rotate_to_tangent(factor: PolarFactor) -> TangentRotation:
    """The rotation in the plane of ``p`` and ``q`` that takes ``h`` away; see the module.

    Where no angle does, the best angle is taken and the rest of ``h`` is subtracted along ``u v^T``. No
    collectives: sums over ranks are in the factor.

    Args:
        factor: ``Phi`` and what goes with it, ``(b, p, q)`` with the long side first.
    """
    mean, w, v = factor.mean, factor.w, factor.v
    mu = torch.where(mean > 0, _SHIFT * mean, 1)
    a, b = _solve_shifted(factor, mu[:, None, None], torch.stack([w, v], dim=-1)).unbind(dim=-1)
    a = mu[:, None] * a - w  # mu p = u + Phi a,  q = Phi b
    ab = torch.stack([a, b], dim=-1)
    images = factor.times_gram(ab)
    images[..., 0] += w  # Phi^T p, Phi^T q

    # From here on all numbers are inner products of p and q with each other, u and y = Phi v.
    w, v, a, b, Gp, Gq = (x.double() for x in (w, v, a, b, *images.unbind(dim=-1)))
    h = (w * v).sum(dim=-1)
    up, uq = factor.u_square.double() + (w * a).sum(dim=-1), (w * b).sum(dim=-1)
    yp, yq = (v * Gp).sum(dim=-1), (v * Gq).sum(dim=-1)
    pp, pq, qq = up + (a * Gp).sum(dim=-1), (b * Gp).sum(dim=-1), (b * Gq).sum(dim=-1)
    tiny = torch.finfo(w.dtype).tiny
    cosine = pq / pp.clamp_min(tiny)
    rest = qq - pq * cosine
    is_plane = rest > _MIN_SINE_SQUARE * qq
    p_norm, q_norm = pp.clamp_min(tiny).sqrt(), torch.where(is_plane, rest, 1).sqrt()
    # Coordinates of u and y in the orthonormal basis of the plane.
    u1, u2 = up / p_norm, (uq - cosine * up) / q_norm
    y1, y2 = yp / p_norm, (yq - cosine * yp) / q_norm
    even, odd = u1 * y1 + u2 * y2, u2 * y1 - u1 * y2
    angle = torch.where(is_plane, _smallest_angle(h - even, even, odd), 0)
    sin, cos_1 = angle.sin(), -2 * (angle / 2).sin().square()  # cos - 1 without cancellation
    left_over = h + even * cos_1 + odd * sin

    # G - 1 in the basis of the plane, taken back to p and q.
    to_basis = torch.stack([1 / p_norm, -cosine / q_norm, torch.zeros_like(angle), 1 / q_norm], dim=-1)
    to_basis = to_basis.unflatten(-1, (2, 2)).mT
    turn = torch.stack([cos_1, -sin, sin, cos_1], dim=-1).unflatten(-1, (2, 2))
    turn = to_basis.mT @ turn @ to_basis
    dtype = factor.u.dtype
    pq_long = factor.image(ab)
    pq_long[..., 0] += factor.u
    left = torch.cat(
        [pq_long @ turn.to(dtype), (-left_over.to(dtype)[:, None] * factor.u).unsqueeze(-1)], dim=-1
    )
    right = torch.cat([images, factor.v.unsqueeze(-1)], dim=-1)
    return TangentRotation(h, left, right)


def _solve_shifted(factor: PolarFactor, mu: Tensor, B: Tensor) -> Tensor:
    """``(H + mu)^-1 B`` for ``(b, q, k)`` by conjugate gradients, each column for itself."""
    tiny = torch.finfo(B.dtype).tiny
    X, residual, P = torch.zeros_like(B), B, B
    square = B.square().sum(dim=-2, keepdim=True)
    for _ in range(_NUM_SOLVE_STEPS):
        image = factor.times_h(P) + mu * P
        step = square / (P * image).sum(dim=-2, keepdim=True).clamp_min(tiny)
        X, residual = X + step * P, residual - step * image
        last, square = square, residual.square().sum(dim=-2, keepdim=True)
        P = residual + square / last.clamp_min(tiny) * P
    return X


def _smallest_angle(constant: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """The root of ``constant + even cos t + odd sin t`` nearest to 0, or what comes nearest to one."""
    size = torch.hypot(even, odd)
    centre = torch.atan2(odd, even)
    spread = torch.acos((-constant / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(-1, 1))
    turns = torch.stack([centre - spread, centre + spread])
    turns = torch.remainder(turns + torch.pi, 2 * torch.pi) - torch.pi
    return torch.where(turns[0].abs() <= turns[1].abs(), turns[0], turns[1])
