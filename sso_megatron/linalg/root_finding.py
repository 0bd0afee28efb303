"""Roots of non-decreasing scalar functions, one for each matrix of a batch.

The function is given as ``evaluate(lam, rows) -> (value, extra)``: ``lam`` and ``value`` are ``(k,)``,
``extra`` is ``(k, ...)``, and ``rows`` tells which ``k`` of the batch's members are meant (``None``: all).
``extra`` of the accepted trial comes back, so that what was computed for it (SSO's ``msign``) is not
computed again.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Evaluate = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Root(NamedTuple):
    """What a search found.

    Attributes:
        lam: ``(b,)`` the accepted trial.
        value: ``(b,)`` the function there.
        extra: ``(b, ...)`` what ``evaluate`` returned beside the value there.
        num_trials: ``(b,)`` int64, evaluations spent.
        converged: ``(b,)`` bool, ``|value| <= tolerance``.
    """

    lam: Tensor
    value: Tensor
    extra: Tensor
    num_trials: Tensor
    converged: Tensor


def bisect_root(
    evaluate: Evaluate,
    start: Tensor,
    *,
    first_step: float,
    bound: float,
    tolerance: float,
    max_iterations: int,
) -> Root:
    """Bracket from ``start`` by doubling steps, then halve (arXiv 2601.08393, appendix on the solver).

    Only members that have not converged are evaluated again, which needs one host synchronisation a
    trial. A member whose bracket fails or that uses up its halvings keeps the best trial it saw and
    is reported as not converged.

    Args:
        evaluate: see the module.
        start: ``(b,)`` first trial.
        first_step: first step of the bracket, then doubled; positive.
        bound: the root lies within ``start +- bound``; no trial goes beyond it.
        tolerance: accept ``|value| <= tolerance``.
        max_iterations: halvings allowed for each member once it has a bracket.
    """
    value, extra = evaluate(start, None)
    best = Root(
        start.clone(),
        value.clone(),
        extra.clone(),
        torch.ones_like(start, dtype=torch.int64),
        value.abs() <= tolerance,
    )
    side = torch.sign(value)  # the near end keeps this sign, the far end has the other
    near = torch.zeros_like(start)
    far = torch.full_like(start, math.nan)
    halvings = torch.zeros_like(best.num_trials)
    exhausted = torch.zeros_like(best.converged)
    while True:
        rows = (~best.converged & ~exhausted & torch.isfinite(best.value)).nonzero().squeeze(-1)
        if rows.numel() == 0:
            return best
        bracketed = ~far[rows].isnan()
        doubled = -side[rows] * (2 * near[rows].abs()).clamp(first_step, bound)
        trial = torch.where(bracketed, (near[rows] + far[rows]) / 2, doubled)
        lam = start[rows] + trial
        value, extra = evaluate(lam, rows)
        best.num_trials[rows] += 1
        halvings[rows] += bracketed
        same_side = torch.sign(value) == side[rows]
        near[rows] = torch.where(same_side, trial, near[rows])
        far[rows] = torch.where(same_side, far[rows], trial)
        improved = value.abs() < best.value[rows].abs()
        better = rows[improved]
        best.lam[better], best.value[better] = lam[improved], value[improved]
        best.extra[better] = extra[improved]
        best.converged[rows] |= value.abs() <= tolerance
        at_bound = ~bracketed & same_side & (trial.abs() >= bound)
        exhausted[rows] |= at_bound | (halvings[rows] >= max_iterations)


class TrackedRoot(NamedTuple):
    """What ``track_root`` found, and where the next search starts.

    Attributes:
        lam: ``(b,)`` the accepted trial.
        value: ``(b,)`` the function there.
        extra: what ``accept`` returned beside the value.
        next_lam: ``(b,)`` start of the next search.
        slope: ``(b,)`` slope of the function near the root.
    """

    lam: Tensor
    value: Tensor
    extra: Any
    next_lam: Tensor
    slope: Tensor


# A rise between two trials that counts half for the slope. Trials before the last err by 6e-3.
_RISE = 2e-2
# A value that says by half that the root is elsewhere.
_FAR = 0.3


def track_root(
    measure: Callable[[Tensor], Tensor],
    accept: Callable[[Tensor], tuple[Tensor, Any]],
    lam: Tensor,
    slope: Tensor,
    *,
    reach: Tensor,
    num_trials: int,
) -> TrackedRoot:
    """Follow a root that moves slowly from call to call, with a fixed number of trials.

    Each trial narrows the bracket that monotonicity gives; the next is a secant step (with the
    stored slope for the first), or the middle of the bracket where that step would leave it. There
    is no data-dependent branch and no host synchronisation.

    Args:
        measure: the function ``(b,)`` of all members, roughly: all trials but the last.
        accept: the function and what is wanted beside it: the last trial.
        lam: ``(b,)`` first trial.
        slope: ``(b,)`` positive estimate of the slope at the root.
        reach: ``(b,)`` how far a step may go, or the distance from zero when that is more: a slope learned
            on a flat stretch would otherwise throw the next trial far beyond the root.
        num_trials: at least 1; the slope is learned from 2 on.
    """
    low, high = torch.full_like(lam, -math.inf), torch.full_like(lam, math.inf)
    last_lam = last_value = extra = None
    for left in reversed(range(num_trials)):
        trial = lam
        if left:
            value = measure(trial)
        else:
            value, extra = accept(trial)
        low = torch.where(value < 0, torch.maximum(low, trial), low)
        high = torch.where(value > 0, torch.minimum(high, trial), high)
        if last_lam is not None and last_value is not None:
            slope = _learned(slope, trial - last_lam, value, last_value)
        last_lam, last_value = trial, value
        limit = torch.maximum(trial.abs(), reach)
        proposal = trial + (-value / slope).clamp(-limit, limit)
        # An end of the bracket counts as inside: at the root to the last digit a step rounds to nothing,
        # and the middle of a bracket with a far end would throw the trial away.
        inside = (proposal >= low) & (proposal <= high)
        middle = (low + high) / 2
        lam = torch.where(inside | ~torch.isfinite(middle), proposal, middle)
    return TrackedRoot(trial, value, extra, torch.where(torch.isfinite(lam), lam, trial), slope)


def _learned(slope: Tensor, step: Tensor, value: Tensor, last_value: Tensor) -> Tensor:
    """The slope after two trials: as much of the secant as their rise is more than noise.

    Continuous in all arguments: ranks that hold a matrix in different ways differ by rounding, which a
    threshold would turn into different searches.
    """
    rise = value - last_value
    secant = rise / step
    usable = torch.isfinite(secant) & (secant > 0)
    trust = torch.where(usable, rise.square() / (rise.square() + _RISE**2), 0)
    # Two trials on the same flat stretch: the stored slope is too steep to get away from it.
    both = (value * last_value).clamp_min(0)
    stuck = (1 - trust) * both / (both + _FAR**2)
    return (slope / 4**stuck) * (torch.where(usable, secant, slope) / slope) ** trust
