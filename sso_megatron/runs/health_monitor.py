"""Decides from a measurement's alarms which of them are news, and whether the run must end.

It works on numbers on the host, and remembers the measurements before; ``runs.alarms`` has the rules.
"""

from dataclasses import dataclass

from sso_megatron.runs.alarms import Alarm, Alarms, lines
from sso_megatron.runs.tables import Tables


@dataclass(frozen=True)
class Judgement:
    """The monitor's verdict on one measurement.

    Attributes:
        alarms: lines for the run's files.
        news: lines for the terminal: alarms that the measurement before did not raise.
    """

    alarms: list[str]
    news: list[str]


class HealthMonitor:
    """Judges the measurements of one run, in their order.

    Attributes:
        stop_reason: text of the alarm that ends the run; None while it goes on.
    """

    def __init__(self, mode: str) -> None:
        """Take the value of ``--spectral-health``: ``off``, ``warn`` or ``stop``."""
        self._mode = mode
        self._rules = Alarms()
        self._raised: set[tuple[str, str]] = set()
        self._num_skipped = 0  # measured steps in a row that were not taken
        self.stop_reason: str | None = None

    @property
    def can_stop(self) -> bool:
        """Whether an alarm ends the run, so that every rank has to judge."""
        return self._mode == "stop"

    def judge(self, iteration: int, tables: Tables, is_skipped: bool) -> Judgement:
        """Return a measurement's alarms, and set ``stop_reason`` if one of them ends the run.

        Args:
            iteration: number of the measured iteration.
            tables: ``matrices``, ``layers`` and ``experts``.
            is_skipped: whether the optimizer did not take this step.
        """
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        # A single skipped step is over, although its forward pass may well have been sick.
        is_judged = self._mode != "off" and self._num_skipped != 1
        alarms = self._rules.check(iteration, tables) if is_judged else []
        news = [alarm for alarm in alarms if _key(alarm) not in self._raised]
        self._raised = {_key(alarm) for alarm in alarms}
        if alarms and self.can_stop:
            self.stop_reason = alarms[0].text
        return Judgement(lines(alarms), lines(news))


def _key(alarm: Alarm) -> tuple[str, str]:
    return alarm.kind, alarm.module
