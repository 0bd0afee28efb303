"""Batched root searches on functions whose roots are known."""

import pytest
import torch
from torch import Tensor

from sso_megatron.linalg.root_finding import TrackedRoot, bisect_root, track_root

SETTINGS = {"first_step": 1e-3, "bound": 8.0, "tolerance": 1e-5, "max_iterations": 40}


class Functions:
    """h(lam) = tanh(steepness (lam - root)), one for each member; counts evaluations."""

    def __init__(self, roots: list[float], steepness: list[float]) -> None:
        self.roots, self.steepness = torch.tensor(roots), torch.tensor(steepness)
        self.evaluated = torch.zeros(len(roots), dtype=torch.int64)

    def __call__(self, lam: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.roots)) if rows is None else rows
        self.evaluated[rows] += 1
        value = torch.tanh(self.steepness[rows] * (lam - self.roots[rows]))
        return value, lam[:, None] * torch.ones(2)


def track(f, lam: Tensor, slope: Tensor, num_trials: int) -> TrackedRoot:
    """All trials as exact as the last."""
    reach = torch.full_like(lam, 0.05)
    return track_root(
        lambda x: f(x, None)[0], lambda x: f(x, None), lam, slope, reach=reach, num_trials=num_trials
    )


def test_bisection_finds_every_root() -> None:
    f = Functions([0.0, 0.3, -0.3, 1e-5, 5.0, -7.9], [1.0, 10.0, 30.0, 1.0, 0.5, 2.0])
    root = bisect_root(f, torch.zeros(6), **SETTINGS)
    assert root.converged.all()
    assert (root.value.abs() <= 1e-5).all()
    assert ((root.lam - f.roots).abs() * f.steepness <= 1.1e-5).all()
    assert torch.equal(root.num_trials, f.evaluated), "converged members are not evaluated again"
    assert root.num_trials[0] == 1
    assert torch.equal(root.extra, root.lam[:, None] * torch.ones(2)), "of the accepted trial"


def test_bisection_reports_what_it_could_not_find() -> None:
    """A root beyond the bound, and one jump without a root; the third must not suffer."""
    f = Functions([20.0, 0.4321, 0.1], [0.01, 1e9, 1.0])
    root = bisect_root(f, torch.zeros(3), **(SETTINGS | {"max_iterations": 15}))
    assert root.converged.tolist() == [False, False, True]
    assert root.lam[0] == 8.0, "the best it saw, which is at the bound"
    assert abs(root.value[1]) == 1, "no trial was better than the first"
    assert root.num_trials[1] <= 11 + 15


def test_bisection_stops_on_nan() -> None:
    root = bisect_root(lambda lam, rows: (lam * torch.nan, lam[:, None]), torch.zeros(2), **SETTINGS)
    assert not root.converged.any()


def test_tracking_from_nothing() -> None:
    f = Functions([0.15, -0.02, 0.8, 0.0], [5.0, 30.0, 3.0, 10.0])
    found = track(f, torch.zeros(4), torch.full((4,), 10.0), num_trials=10)
    assert (found.value.abs() < 1e-3).all()
    assert (f.evaluated == 10).all(), "a fixed number of trials"
    ratio = found.slope / f.steepness
    assert (ratio > 0.5).all() and (ratio < 1.5).all()


def test_tracking_follows_a_moving_root_with_two_trials() -> None:
    f = Functions([0.10, -0.05], [8.0, 20.0])
    lam, slope = f.roots.clone(), f.steepness.clone()
    for step in range(100):
        f.roots = torch.tensor([0.10 + 0.001 * step, -0.05 - 0.0005 * step])
        found = track(f, lam, slope, num_trials=2)
        lam, slope = found.next_lam, found.slope
        assert (found.value.abs() < 1e-3).all()


def test_tracking_survives_a_wrong_slope_and_a_sudden_move() -> None:
    f = Functions([3.0], [10.0])
    lam, slope = torch.tensor([0.1]), torch.tensor([1e-4])
    for _ in range(8):
        found = track(f, lam, slope, num_trials=2)
        lam, slope = found.next_lam, found.slope
    assert abs(found.value.item()) < 1e-3
    assert torch.isfinite(lam).all() and (slope > 0).all()


@pytest.mark.parametrize(("root", "start"), [(0.15, -0.2), (-0.3, 0.4)])
def test_tracking_gets_away_from_a_slope_that_is_too_steep(root: float, start: float) -> None:
    """On a saturated stretch no secant can be taken: the steep slope itself has to give way."""
    f = Functions([root], [30.0])
    lam, slope = torch.tensor([start]), torch.tensor([5000.0])
    for _ in range(20):
        found = track(f, lam, slope, num_trials=2)
        lam, slope = found.next_lam, found.slope
    assert abs(found.value.item()) < 1e-3


def test_tracking_one_trial_is_one_evaluation() -> None:
    f = Functions([0.1], [10.0])
    found = track(f, torch.tensor([0.09]), torch.tensor([10.0]), num_trials=1)
    assert f.evaluated.item() == 1
    assert found.lam == torch.tensor([0.09])
    torch.testing.assert_close(found.next_lam, f.roots, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rest", [3e-9, -3e-9])
def test_tracking_stays_where_a_step_rounds_to_nothing(rest: float) -> None:
    """At the root to the last digit; the bracket has a far end to which it must not turn."""
    f = Functions([0.1], [10.0])

    def never_zero(lam: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        value, extra = f(lam, rows)
        return torch.where(value.abs() < 1e-6, rest, value), extra

    for num_trials in range(8, 16):
        found = track(never_zero, torch.tensor([0.3]), torch.tensor([10.0]), num_trials=num_trials)
        assert abs(found.lam.item() - 0.1) < 1e-6
        assert abs(found.next_lam.item() - 0.1) < 1e-6


def test_tracking_puts_up_with_rough_trials() -> None:
    """All but the last are 2e-2 too high: the last is off by no more, and says so exactly."""
    f = Functions([0.1, -0.2], [8.0, 20.0])
    found = track_root(
        lambda lam: f(lam, None)[0] + 2e-2,
        lambda lam: f(lam, None),
        f.roots + 0.01,
        f.steepness.clone(),
        reach=torch.full((2,), 0.05),
        num_trials=2,
    )
    assert (found.value.abs() < 2.2e-2).all()
    torch.testing.assert_close(found.value, f(found.lam, None)[0])


def test_tracking_is_continuous() -> None:
    """No threshold: what differs by rounding stays so, wherever a step begins."""
    starts = torch.linspace(-0.5, 0.5, 20001)
    f = Functions([0.1], [10.0])
    f.roots, f.steepness = f.roots.expand_as(starts), f.steepness.expand_as(starts)
    f.evaluated = torch.zeros(len(starts), dtype=torch.int64)
    found = track(f, starts, torch.full_like(starts, 25.0), num_trials=2)
    for value in (found.value, found.next_lam, found.slope.log()):
        # Starts are 5e-5 apart; the steepest stretch magnifies by a few hundred.
        assert value.diff().abs().max() < 2e-2
