"""The parts of a run's records that need no Megatron: losses, health, the summary, the radius error."""

import math

import numpy as np
import pytest
import torch

from sso_megatron import SSO
from sso_megatron.matrices.names import natural_order
from sso_megatron.mcore.metrics.losses import PendingLosses, loss_lines, loss_vector
from sso_megatron.optimizers.radius_error import max_radius_error
from sso_megatron.runs.health_monitor import HealthMonitor
from sso_megatron.runs.summary import RunTotals, summarize
from sso_megatron.runs.tables import Table


def test_losses_come_from_the_ranks_that_have_them() -> None:
    """Two ranks, of which the second is a last pipeline stage; the second iteration reported no loss."""
    first, last = PendingLosses(), PendingLosses()
    for iteration, loss in ((7, torch.tensor(2.5)), (8, None), (9, torch.tensor(math.nan))):
        first.add(iteration, None)
        last.add(iteration, loss)
    ranks = [pending.take() for pending in (first, last)]
    assert last.take() == []
    numbers = np.stack([loss_vector(taken, torch.device("cpu")).numpy() for taken in ranks])
    assert numbers[0].tolist() == [0.0] * 6
    lines = loss_lines(ranks[0], numbers)
    assert [line["iteration"] for line in lines] == [7, 8, 9]
    assert [line["time"] for line in lines] == [taken.time for taken in ranks[0]]
    assert lines[0]["loss"] == 2.5
    assert "loss" not in lines[1]
    assert math.isnan(lines[2]["loss"])


def layers(*rms: float) -> dict[str, Table]:
    rows = tuple(f"layers.{i}" for i in range(len(rms)))
    return {"layers": Table(rows, {"residual_rms": np.array(rms), "residual_max": np.array(rms)})}


def test_an_alarm_is_news_once() -> None:
    monitor = HealthMonitor("warn")
    assert monitor.judge(1, layers(1.0, 1.0), is_skipped=False).alarms == []
    spoilt = monitor.judge(2, layers(1.0, math.inf), is_skipped=False)
    (alarm,) = spoilt.alarms
    assert alarm.startswith("activations: layers.1: ") and spoilt.news == [alarm]
    lasting = monitor.judge(3, layers(math.inf, math.inf), is_skipped=False)
    assert len(lasting.alarms) == 2
    (news,) = lasting.news
    assert news.startswith("activations: layers.0: ")
    assert monitor.judge(4, layers(1.0, 1.0), is_skipped=False).news == []
    assert monitor.judge(5, layers(1.0, math.inf), is_skipped=False).news != [], "it had gone"
    assert monitor.stop_reason is None


def test_one_skipped_step_is_no_alarm_and_two_in_a_row_are() -> None:
    monitor = HealthMonitor("stop")
    for iteration, is_skipped, is_alarm in (
        (1, False, False),
        (2, True, False),
        (3, False, False),
        (4, True, False),
        (5, True, True),
    ):
        assert monitor.stop_reason is None
        tables = layers(math.inf if is_skipped else 1.0)
        assert bool(monitor.judge(iteration, tables, is_skipped).alarms) == is_alarm, iteration
    assert monitor.stop_reason is not None and monitor.stop_reason.startswith("activations: layers.0: ")


@pytest.mark.parametrize(("mode", "judges", "stops"), [("off", 0, 0), ("warn", 1, 0), ("stop", 1, 1)])
def test_modes(mode: str, judges: bool, stops: bool) -> None:
    monitor = HealthMonitor(mode)
    assert monitor.can_stop == stops
    assert bool(monitor.judge(1, layers(math.inf), is_skipped=False).alarms) == judges
    assert (monitor.stop_reason is not None) == stops


def test_summary() -> None:
    totals = RunTotals()
    empty = summarize(totals, [(None, None), (None, None)], 0.0, None)
    assert empty.pop("iterations") == 0 and empty.pop("seconds") == 0
    assert set(empty.values()) == {None} and "stopped" not in empty
    totals.add([{"iteration": 4}, {"iteration": 5, "loss": 3.0}])
    totals.add([{"iteration": 6, "loss": 2.0}, {"iteration": 7}])
    assert summarize(totals, [(1e-4, None), (None, 2.5), (3e-4, 2.5)], 1.26, "radius: w: off") == {
        "first_loss": 3.0,
        "last_loss": 2.0,
        "val_loss": 2.5,
        "max_radius_error": 3e-4,
        "iterations": 7,
        "seconds": 1.3,
        "stopped": "radius: w: off",
    }


def test_radius_error_is_that_of_the_retracted_weights() -> None:
    """Whatever the weights' own norms are; by numpy's singular values."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(factor * torch.randn(24, 40, generator=gen)) for factor in (0.1, 10.0)]
    optimizer = SSO(params)
    wanted = max(
        abs(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[0] / radius - 1)
        for _, matrix, radius in optimizer.retracted()
    )
    assert max_radius_error([optimizer]) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert max_radius_error([]) is None


def test_layer_2_comes_before_layer_10() -> None:
    names = ["layers.10.fc1", "layers.2.fc2", "layers.2.fc1[gate]", "embedding", "layers.2.fc1"]
    assert sorted(names, key=natural_order) == [names[3], names[4], names[2], names[1], names[0]]
