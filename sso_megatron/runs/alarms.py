"""Alarms from a run's measurements: what differs from a healthy run, and in which module.

The rules work on numbers on the host. ``mcore.metrics`` measures and acts on alarms; ``health_monitor``
decides which of them to act on.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sso_megatron.runs.tables import ACTIVATIONS, EMPTY, TABLES, Array, Table, Tables

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

KINDS = ("radius", "solver", "activations", "logits", "experts")

# A hard-retracted weight is off its sphere by its last step alone: lr * scale / R for an update of spectral
# norm 1. Twice that leaves room for updates of bisection (norm up to 1.5), 1 % for an estimated norm. Below
# 1 and 0 the alarm would sound in healthy runs; beyond 5 and 0.1 it would miss a retraction that fails.
_STEPS_OFF, _NORM_ERROR = 2.0, 0.01
# Dynamic retraction has no such bound: it pulls by alpha * lr a step. 0.2 .. 2.
_FAR_OFF = 0.5
# How far such a weight may go beyond where it began, which may be far outside. 1 .. 2.
_FURTHER = 1.1
# A search fails now and then when a gradient is odd, and an expert of a small batch may get no token. Three
# measurements in a row are no accident (2 .. 10), if they are no neighbours: with ten times the paper's
# learning rate, tracking lost the root for up to 6 iterations and found it again (5 .. 100).
_LASTING_MEASUREMENTS, _LASTING_ITERATIONS = 3, 10
# RMS of activations, by the median of earlier ones. A warm-up makes them grow by 2 or 3 between
# measurements, a run that diverges by powers of ten. 4 .. 100.
_EXPLOSION = 10.0
_HISTORY, _SHORTEST_HISTORY = 20, 5
# A residual stream begins at the embeddings' 0.02 and grows to about 1 in health, whatever the factor. A
# short history may be of the first iterations, and says little. 0.3 .. 10 and 10 .. 1000.
_HARMLESS_RMS, _EARLY_HARMLESS_RMS = 1.0, 100.0
# Softmax of scores so far apart chooses one token, without gradient, and bfloat16 rounds 1000 by 4. Muon's
# runs without a remedy passed 1000 and became unstable (Kimi K2, arXiv 2507.20534). 100 .. 1e4.
_LOGIT_LIMIT = 1000.0
# A share of the mean load of the experts. 0 .. 0.1.
_DEAD_LOAD = 0.01
_NAMED_EXPERTS = 8


@dataclass(frozen=True)
class Alarm:
    """One module's violation of one rule.

    Attributes:
        kind: one of ``KINDS``.
        module: name of the row in its table.
        text: one line: kind, module, value, rule, what to do.
    """

    kind: str
    module: str
    text: str


def _alarm(kind: str, module: str, what: str) -> Alarm:
    return Alarm(kind, module, f"{kind}: {module}: {what}")


class Alarms:
    """Checks each measurement of a run against rules, some of which need earlier measurements.

    When the rows of a table change, its earlier measurements are forgotten.
    """

    def __init__(self) -> None:
        self._matrices: tuple[str, ...] = ()
        self._first_error = self._step = np.empty(0)
        self._unsolved, self._dead = _Streak(), _Streak()
        self._layers: tuple[str, ...] = ()
        self._rms: deque[Array] = deque(maxlen=_HISTORY)
        self._was_known = np.empty((0, 2 * len(ACTIVATIONS) + 1), dtype=bool)

    def check(self, iteration: int, tables: Tables) -> list[Alarm]:
        """Take the next measurement and return its alarms, grouped by kind, the worst of each kind first.

        Args:
            iteration: the iteration that was measured; alarms that need several say since which.
            tables: the measured tables.
        """
        matrices, layers, experts = (tables.get(name, EMPTY) for name in TABLES)
        return [
            *self._radius(matrices),
            *self._solver(iteration, matrices),
            *self._activations(layers),
            *self._experts(iteration, experts),
        ]

    def _radius(self, table: Table) -> list[Alarm]:
        norm, error, step = (table.column(n) for n in ("spectral_norm", "radius_error", "relative_step"))
        if table.rows != self._matrices:
            self._matrices = table.rows
            self._first_error, self._step = np.full_like(error, np.nan), step
        # After a step that was skipped nothing is known of a row, which is no alarm; NaN beside numbers is.
        fixed = ("spectral_norm", "radius", "relative_step")
        others = [~np.isnan(column) for name, column in table.columns.items() if name not in fixed]
        taken = np.any(others, axis=0) if others else np.zeros(norm.shape, dtype=bool)
        broken = np.isinf(norm) | (np.isnan(norm) & taken & ("spectral_norm" in table.columns))
        # The excess that is seen now was made by the step before, maybe with another learning rate.
        allowed = _STEPS_OFF * np.fmax(step, self._step) + _NORM_ERROR
        allowed = np.where(np.isnan(step), np.fmax(_FAR_OFF, _FURTHER * self._first_error), allowed)
        # At the first one weights may still be where an initialisation or another optimizer left them.
        seen = ~np.isnan(self._first_error)
        off = np.where(seen & ~broken & (np.abs(error) > allowed), np.abs(error), 0.0)
        self._first_error = np.where(seen, self._first_error, np.abs(error))
        self._step = np.where(np.isnan(step), self._step, step)
        rows = table.rows
        what = "spectral norm {}, not a finite number; go back to an earlier checkpoint"
        alarms = [_alarm("radius", rows[i], what.format(norm[i])) for i in np.flatnonzero(broken)]
        for i in _worst_first(off):
            if np.isnan(step[i]):
                rule = f"limit {allowed[i]:.0%} under dynamic retraction; try hard retraction or a lower lr"
            else:
                rule = f"limit {allowed[i]:.2%} from its step size; see what else writes to this weight"
            alarms.append(_alarm("radius", rows[i], f"{error[i]:+.2%} off its radius, {rule}"))
        return alarms

    def _solver(self, iteration: int, table: Table) -> list[Alarm]:
        converged, residual = table.column("converged"), table.column("residual")
        count = self._unsolved.count(iteration, table.rows, converged == 0, ~np.isnan(converged))
        # The longest first; among equals the largest residual, which is below 1.
        severity = np.where(self._unsolved.lasts(iteration), count + np.fmin(np.abs(residual), 0.99), 0.0)
        alarms = []
        for i in _worst_first(severity):
            what = f"lambda not found in {count[i]} measurements in a row, since iteration "
            what += f"{self._unsolved.since[i]} (residual {residual[i]:.2g}); "
            what += "lower the lr, or raise --sso-solver-trials"
            alarms.append(_alarm("solver", table.rows[i], what))
        return alarms

    def _activations(self, table: Table) -> list[Alarm]:
        rms = np.stack([table.column(f"{place}_rms") for place in ACTIVATIONS], axis=1)
        peak = np.stack([table.column(f"{place}_max") for place in ACTIVATIONS], axis=1)
        logit = table.column("logit_max")
        known = ~np.isnan(np.concatenate([rms, peak, logit[:, None]], axis=1))
        if table.rows != self._layers:
            self._layers, self._was_known = table.rows, known
            self._rms.clear()
        # What a layer does not have is never known; a number that turns into NaN is an alarm.
        lost = self._was_known & ~known
        self._was_known = self._was_known | known
        broken = np.isinf(rms) | np.isinf(peak) | lost[:, :3] | lost[:, 3:6]
        median, harmless = self._usual_rms()
        exploded = (rms > _EXPLOSION * median) & (rms > harmless)
        # What exploded is not usual; a level that lasts is, when it is all that is left of the history.
        self._rms.append(np.where(np.isfinite(rms) & ~exploded, rms, np.nan))
        growth = np.where(exploded, rms / median, 0.0)
        growth[broken] = np.inf
        alarms = []
        for i in _worst_first(growth.max(axis=1, initial=0.0)):
            j = int(growth[i].argmax())
            if broken[i, j]:
                what = f"RMS {rms[i, j]:.3g}, largest {peak[i, j]:.3g}, not finite; go back to a checkpoint"
            else:
                what = f"RMS {rms[i, j]:.3g}, {growth[i, j]:.3g} times the median of its last "
                what += f"measurements (limit {_EXPLOSION:.0f}); lower the lr, or warm up longer"
            alarms.append(_alarm("activations", table.rows[i], f"{ACTIVATIONS[j]}: {what}"))
        size = np.where(np.isinf(logit) | lost[:, 6], np.inf, logit)
        for i in _worst_first(np.where(size > _LOGIT_LIMIT, size, 0.0)):
            what = f"largest attention logit {logit[i]:.4g}, limit {_LOGIT_LIMIT:.0f}; "
            alarms.append(_alarm("logits", table.rows[i], f"{what}lower the lr, or use --qk-layernorm"))
        return alarms

    def _usual_rms(self) -> tuple[Array, Array]:
        """Median RMS of the last measurements, and the RMS below which growth is harmless; ``(layers, 3)``.

        The median is NaN where nothing was measured.
        """
        median = np.full((len(self._layers), len(ACTIVATIONS)), np.nan)
        if not self._rms:
            return median, median
        past = np.stack(list(self._rms))
        num_known = np.sum(~np.isnan(past), axis=0)
        median[num_known > 0] = np.nanmedian(past[:, num_known > 0], axis=0)
        return median, np.where(num_known < _SHORTEST_HISTORY, _EARLY_HARMLESS_RMS, _HARMLESS_RMS)

    def _experts(self, iteration: int, table: Table) -> list[Alarm]:
        load = table.columns.get("load")
        if load is None or not load.size:
            return []
        self._dead.count(iteration, table.rows, load < _DEAD_LOAD, ~np.isnan(load))
        dead = self._dead.lasts(iteration)
        alarms = []
        for i in _worst_first(dead.sum(axis=1).astype(np.float64)):
            which = np.flatnonzero(dead[i])
            more = f" and {which.size - _NAMED_EXPERTS} more" if which.size > _NAMED_EXPERTS else ""
            named = ", ".join(str(expert) for expert in which[:_NAMED_EXPERTS])
            what = f"dead expert {named}{more} of {load.shape[1]}, below {_DEAD_LOAD:.0%} of the mean load "
            what += f"since iteration {self._dead.since[i][which].min()}; balance the router more strongly"
            alarms.append(_alarm("experts", table.rows[i], what))
        return alarms


class _Streak:
    """Counts, row by row, in how many consecutive measurements a condition held."""

    def __init__(self) -> None:
        self.rows: tuple[str, ...] = ()
        self.counts = self.since = np.empty(0, dtype=np.int64)

    def count(self, iteration: int, rows: tuple[str, ...], bad: Mask, known: Mask) -> Indices:
        """Take the next measurement and return the counts.

        Args:
            iteration: the iteration that was measured.
            rows: names of the rows; when they change, counting starts again.
            bad: whether the condition holds.
            known: whether that was measured; where it was not, the count stays.
        """
        if rows != self.rows or bad.shape != self.counts.shape:
            self.rows = rows
            self.counts = self.since = np.zeros(bad.shape, dtype=np.int64)
        self.since = np.where(self.counts == 0, iteration, self.since)
        self.counts = np.where(known, (self.counts + 1) * bad, self.counts)
        return self.counts

    def lasts(self, iteration: int) -> Mask:
        """Return a mask of the rows in which the condition has held too long for an accident."""
        has_lasted = iteration - self.since >= _LASTING_ITERATIONS
        return (self.counts >= _LASTING_MEASUREMENTS) & has_lasted


def _worst_first(severity: Array) -> Indices:
    """Return the indices of the positive entries, the largest first; equal entries keep their order."""
    indices = np.flatnonzero(severity > 0)
    return indices[np.argsort(-severity[indices], kind="stable")]


def lines(alarms: list[Alarm], limit: int = 5) -> list[str]:
    """Choose the alarms to show, and return their texts.

    The worst alarm of every kind comes before the second of any kind. If some are left out, a last text
    says how many.

    Args:
        alarms: what ``Alarms.check`` returned.
        limit: most alarms to show.
    """
    place: Counter[str] = Counter()
    ranked = []
    for position, alarm in enumerate(alarms):
        ranked.append((place[alarm.kind], position))
        place[alarm.kind] += 1
    shown = sorted(position for _, position in sorted(ranked)[:limit])
    texts = [alarms[position].text for position in shown]
    if len(alarms) > limit:
        texts.append(f"... and {len(alarms) - limit} more")
    return texts
