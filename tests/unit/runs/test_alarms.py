"""Alarms on measurements of made-up runs, healthy and sick: which module, when first, when no more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sso_megatron.runs.alarms import KINDS, Alarm, Alarms, lines
from sso_megatron.runs.tables import Table, headlines

NAN, INF = math.nan, math.inf


def table(rows: tuple[str, ...], **columns: object) -> Table:
    return Table(rows, {name: np.array(values, dtype=np.float64) for name, values in columns.items()})


def matrices(**columns: object) -> dict[str, Table]:
    """Healthy matrices a, b and c of an SSO run, apart from the given columns."""
    healthy = {
        "spectral_norm": [1.0, 2.0, 1.0],
        "update_rms": [0.1, 0.1, 0.1],
        "radius": [1.0, 2.0, 1.0],
        "radius_error": [0.001, -0.001, 0.0],
        "relative_step": [0.02, 0.01, 0.02],
        "residual": [0.01, 0.02, -0.03],
        "converged": [1, 1, 1],
    }
    return {"matrices": table(("a", "b", "c"), **(healthy | columns))}


def layers(residual_rms: object, **columns: object) -> dict[str, Table]:
    """Layers 0 and 1, the second of which has no attention."""
    known = {
        "residual_rms": residual_rms,
        "residual_max": [3.0, 3.0],
        "attention_rms": [0.5, NAN],
        "attention_max": [2.0, NAN],
        "logit_max": [12.0, NAN],
    }
    return {"layers": table(("layers.0", "layers.1"), **(known | columns))}


def experts(*load: list[float]) -> dict[str, Table]:
    return {"experts": table(tuple(f"layers.{i}" for i in range(len(load))), load=load, max_vio=[0.1])}


def found(alarms: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.kind, alarm.module) for alarm in alarms]


# ---------------------------------------------------------------- radius


def test_a_weight_that_its_step_does_not_explain() -> None:
    """Allowed are twice the relative step and one percent: 5 % of a, 3 % of b."""
    alarms = Alarms()
    assert alarms.check(1, matrices()) == []
    assert alarms.check(2, matrices(radius_error=[0.049, -0.029, 0.0])) == []
    raised = alarms.check(3, matrices(radius_error=[0.051, -0.031, -0.2]))
    assert found(raised) == [("radius", "c"), ("radius", "a"), ("radius", "b")], "the worst first"
    assert raised[0].text == (
        "radius: c: -20.00% off its radius, limit 5.00% from its step size; "
        "see what else writes to this weight"
    )
    assert alarms.check(4, matrices()) == []


def test_a_start_off_the_sphere_is_no_alarm() -> None:
    """Without --spectral-mup-init, or after another optimizer, weights reach it in the first step."""
    alarms = Alarms()
    assert alarms.check(1, matrices(radius_error=[4.0, -0.9, NAN])) == []
    assert found(alarms.check(2, matrices(radius_error=[4.0, 0.0, 4.0]))) == [("radius", "a")]
    assert found(alarms.check(3, matrices(radius_error=[0.0, 0.0, 4.0]))) == [("radius", "c")]


def test_a_learning_rate_that_falls_at_once() -> None:
    """The excess that is measured was made with the learning rate of the step before."""
    alarms, error = Alarms(), [0.02, 0.015, 0.02]
    small = matrices(radius_error=error, relative_step=[1e-4, 1e-4, 1e-4])
    alarms.check(1, matrices(radius_error=error))
    assert alarms.check(2, small) == []
    assert len(alarms.check(3, small)) == 3


def test_dynamic_retraction_has_a_wide_limit() -> None:
    """From far outside, too, as long as it comes nearer."""
    alarms = Alarms()

    def dynamic(*errors: float) -> dict[str, Table]:
        return matrices(radius_error=errors, relative_step=[NAN, NAN, NAN])

    assert alarms.check(1, dynamic(0.1, 3.0, 0.0)) == []
    assert alarms.check(2, dynamic(0.49, 3.2, -0.49)) == []
    raised = alarms.check(3, dynamic(0.51, 3.4, -0.49))
    assert found(raised) == [("radius", "b"), ("radius", "a")]
    assert "limit 50% under dynamic retraction" in raised[1].text


@pytest.mark.parametrize("norm", [INF, NAN])
def test_a_norm_that_is_not_finite(norm: float) -> None:
    """At once, at the first measurement, and by the other optimizers, which have no radius, too."""
    update = {"spectral_norm": [1.0, norm], "update_rms": [0.1, 0.1]}
    raised = Alarms().check(1, {"matrices": table(("a", "b"), **update)})
    assert found(raised) == [("radius", "b")]
    assert f"spectral norm {norm}" in raised[0].text


def test_a_step_that_was_skipped_is_no_alarm() -> None:
    """A gradient that is not finite: nothing is known of any matrix, or all but its settings."""
    alarms = Alarms()
    nothing = dict.fromkeys(matrices()["matrices"].columns, [NAN] * 3)
    assert alarms.check(1, matrices(**nothing)) == []
    assert alarms.check(2, matrices()) == []
    for kept in ({}, {"radius": [1.0, 2.0, 1.0], "relative_step": [0.02, 0.01, 0.02]}):
        assert alarms.check(3, matrices(**(nothing | kept))) == []
    assert found(alarms.check(4, matrices(radius_error=[0.0, 0.0, 0.3]))) == [("radius", "c")]


# ---------------------------------------------------------------- solver


def test_a_solver_that_fails_three_times_in_a_row() -> None:
    alarms = Alarms()
    failed = matrices(converged=[0, 1, 0], residual=[0.5, 0.01, -0.7])
    assert alarms.check(10, failed) == []
    assert alarms.check(20, failed) == []
    assert alarms.check(25, matrices(converged=[NAN] * 3)) == [], "a skipped step does not count"
    raised = alarms.check(30, failed)
    assert found(raised) == [("solver", "c"), ("solver", "a")], "the larger residual first"
    assert "in 3 measurements in a row, since iteration 10 (residual -0.7)" in raised[0].text
    assert found(alarms.check(40, matrices(converged=[1, 0, 0]))) == [("solver", "c")]
    assert alarms.check(50, matrices()) == []
    assert alarms.check(60, failed) == alarms.check(70, failed) == [], "counted anew"


def test_failures_of_a_few_iterations_are_no_alarm() -> None:
    """Where every iteration is measured, three measurements in a row are soon over."""
    alarms, load = Alarms(), [0.0, 2.0, 1.0, 1.0]
    failed = matrices(converged=[0, 1, 1]) | experts(load)
    raised = [found(alarms.check(iteration, failed)) for iteration in range(100, 111)]
    assert raised == [[]] * 10 + [[("solver", "a"), ("experts", "layers.0")]]


# ---------------------------------------------------------------- activations and logits


def test_activations_that_explode() -> None:
    """Ten times the median of at least five measurements, as long as it is not the usual level."""
    alarms = Alarms()
    for iteration in range(5):
        assert alarms.check(iteration, layers([0.5 + 0.1 * iteration, 1.0])) == []
    assert alarms.check(5, layers([6.9, 1.0])) == []
    raised = alarms.check(6, layers([7.1 * 1.1, 1.0]))
    assert found(raised) == [("activations", "layers.0")]
    assert "residual: RMS 7.81, 10.4 times the median" in raised[0].text
    later = [bool(alarms.check(7 + i, layers([90.0, 1.0]))) for i in range(30)]
    assert later == [True] * 15 + [False] * 15, "five of the earlier ones are left, which counts for little"


def test_the_first_measurements_say_little() -> None:
    """With fewer than five before it, only an RMS above 100 is an alarm."""
    alarms = Alarms()
    for iteration, rms in enumerate([1.0, 1.0, 1.0, 1.0, 50.0]):
        assert alarms.check(iteration, layers([1.0, rms])) == []
    assert found(alarms.check(5, layers([1.0, 50.0]))) == [("activations", "layers.1")]


def test_a_run_that_explodes_at_once() -> None:
    """RMS of a residual stream in a first run with --optimizer sso and a learning rate of 0.5."""
    alarms = Alarms()
    for iteration, rms in enumerate([2.833, 160.4, 508.2, 241.8, 855.8, 864.9, 1025.2, 726.6, 509.5], 1):
        raised = alarms.check(5 * iteration, layers([rms, 1.0]))
        assert found(raised) == [("activations", "layers.0")] * (iteration > 1)


def test_growth_from_the_initialisation_is_no_alarm() -> None:
    """From the embeddings' standard deviation to a residual stream of about 1, however fast."""
    alarms = Alarms()
    for iteration, rms in enumerate([*[0.02] * 10, *np.geomspace(0.02, 1.0, 4), *[1.0] * 10]):
        assert alarms.check(iteration, layers([rms, rms])) == []


def test_steady_growth_is_no_alarm() -> None:
    """By a tenth from measurement to measurement: 1.1^10 in half a history."""
    alarms = Alarms()
    for iteration in range(60):
        assert alarms.check(iteration, layers([1.1**iteration, 1.0])) == []


@pytest.mark.parametrize("column", ["residual_rms", "residual_max", "attention_max"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_activations_that_are_not_finite(column: str, value: float) -> None:
    """Infinite at any time; NaN where there was a number. What a layer does not have is no alarm."""
    alarms = Alarms()
    assert alarms.check(1, layers([1.0, 1.0])) == []
    raised = alarms.check(2, layers(**({"residual_rms": [1.0, 1.0]} | {column: [value, NAN]})))
    place = column.split("_")[0]
    wanted = [("activations", "layers.0")] + [("activations", "layers.1")] * (place == "residual")
    assert found(raised) == wanted, "in the order of the layers"
    assert raised[0].text.startswith(f"activations: layers.0: {place}: RMS ")
    assert "not finite" in raised[0].text


def test_attention_logits() -> None:
    alarms = Alarms()
    assert alarms.check(1, layers([1.0, 1.0], logit_max=[999.0, 30.0])) == []
    raised = alarms.check(2, layers([1.0, 1.0], logit_max=[1001.0, INF]))
    assert found(raised) == [("logits", "layers.1"), ("logits", "layers.0")]
    assert "attention logit 1001, limit 1000; lower the lr, or use --qk-layernorm" in raised[1].text
    assert found(alarms.check(3, layers([1.0, 1.0], logit_max=[NAN, 30.0]))) == [("logits", "layers.0")]


# ---------------------------------------------------------------- experts


def test_dead_experts() -> None:
    """Three measurements in a row, each expert by itself; one alarm a layer, the worst layer first."""
    alarms = Alarms()
    assert alarms.check(10, experts([1.0, 0.0, 2.0, 1.0], [1.0, 0.0, 0.0, 3.0])) == []
    assert alarms.check(20, experts([1.0, 0.0, 0.0, 3.0], [1.0, 0.0, 0.0, 3.0])) == []
    raised = alarms.check(30, experts([1.0, 0.009, 0.0, 2.9], [2.0, 0.0, 0.0, 2.0]))
    assert found(raised) == [("experts", "layers.1"), ("experts", "layers.0")]
    assert "dead expert 1, 2 of 4, below 1% of the mean load since iteration 10" in raised[0].text
    assert "dead expert 1 of 4" in raised[1].text
    assert alarms.check(40, experts([1.0, 0.02, 0.1, 2.9], [1.0, 1.0, 1.0, 1.0])) == []


def test_many_dead_experts_are_counted() -> None:
    alarms = Alarms()
    load = [0.0] * 20 + [5.0] * 5
    texts = [alarms.check(10 * i, experts(load)) for i in range(3)][-1]
    assert "dead expert 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of 25" in texts[0].text


# ---------------------------------------------------------------- all together


def test_rows_that_change_start_anew() -> None:
    """A resume in another layout: nothing of the other rows is compared."""
    alarms = Alarms()
    for iteration in range(2):
        alarms.check(iteration, matrices(converged=[0, 0, 0]) | layers([1.0, 1.0]))
    other = {"matrices": table(("b",), converged=[0], radius_error=[3.0], relative_step=[0.1])}
    assert alarms.check(2, other) == []
    assert alarms.check(3, {}) == []


def test_a_run_that_has_nothing_to_measure() -> None:
    assert Alarms().check(1, {"matrices": table(()), "layers": table(()), "experts": table(())}) == []


def test_lines_show_each_kind_before_a_second_of_any() -> None:
    alarms = [Alarm(kind, f"m{i}", f"{kind}: m{i}") for kind in KINDS[:3] for i in range(10)]
    shown = ["radius: m0", "radius: m1", "solver: m0", "solver: m1", "activations: m0"]
    assert lines(alarms) == [*shown, "... and 25 more"]
    assert lines(alarms[:5]) == [f"radius: m{i}" for i in range(5)]
    assert lines(alarms[:3], limit=2) == ["radius: m0", "radius: m1", "... and 1 more"]
    assert lines([]) == []


def test_headlines() -> None:
    tables = matrices(radius_error=[0.1, -0.4, NAN], converged=[0, NAN, 1], update_ratio=[1.0, 5.0, 3.0])
    tables |= layers([1.0, 2.0], attention_max=[7.0, NAN], logit_max=[INF, 3.0])
    tables |= experts([1.0, 1.0])
    assert headlines(tables) == {
        "radius_error": 0.4,
        "residual": 0.03,
        "not_converged": 1.0,
        "update_ratio": 3.0,
        "activation_rms": 2.0,
        "activation_max": 7.0,
        "logit_max": INF,
        "max_vio": 0.1,
    }


def test_headlines_of_nothing() -> None:
    assert set(headlines({}).values()) == {None}
