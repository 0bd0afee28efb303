"""The present state of a run, read from its folder while the run appends to it."""

import math
import os
import time
from bisect import bisect_left
from collections import deque
from itertools import pairwise
from pathlib import Path

from sso_megatron.runs.file_format import DESCRIPTION, METRICS, SUMMARY
from sso_megatron.runs.json_lines import IterationOrder, Record, iteration_of, parse_object, read_object
from sso_megatron.runs.json_numbers import number_of

LIGHTS = {
    "solver": "not_converged",
    "radius": "radius_error",
    "activations": "activation_rms",
    "logits": "logit_max",
    "experts": "max_vio",
}
"""For each kind of alarm the headline that has a number where the kind is measured."""

_CHUNK_BYTES = 1 << 20
_MAX_LOSSES = 4096
_NUM_ALARMS, _NUM_LINES = 20, 20
# Enough that one evaluation or save among them does not show in the median.
_NUM_PACES = 20
# The lines of a log interval are written together, with times some microseconds apart.
_SAME_TIME_SECONDS = 5e-3
# Silence is worth a word after so many usual gaps between lines, and not before a minute: evaluations and
# saves take as long as some iterations.
_SILENT_GAPS, _SILENT_SECONDS = 10, 60.0


class RunState:
    """The state of a run at the time of the last ``poll``.

    A poll reads only those lines of ``metrics.jsonl`` that are new, but a file that was replaced or has
    become shorter from its start. A line that a killed run left unfinished is passed over, and so is one
    without iteration and time. What a resumed part replaces is forgotten.

    Attributes:
        folder: what ``--spectral-run-dir`` names.
        about: ``run.json``; empty if there is none.
        summary: ``summary.json``; empty if there is none.
        last: the newest line; None before the first.
        interval: the newest ``lr`` and ``grad_norm``, by name.
        measured: the newest line with ``headlines``; None if there is none.
        losses: iterations and losses of the whole run, thinned out.
        lines: the newest lines with ``lr``.
        alarms: iteration and text of the newest alarms by kind and module, the newest last.
        num_resumes: how often the run was resumed at an iteration that it had done before.
    """

    def __init__(self, folder: Path, total: int | None = None) -> None:
        """Read nothing yet.

        Args:
            folder: what ``--spectral-run-dir`` names; need not exist.
            total: iterations of the whole run, used where ``run.json`` does not say.
        """
        self.folder = folder
        self._total = total
        self.about: Record = {}
        self.summary: Record = {}
        self._start_anew()

    def _start_anew(self) -> None:
        self._order = IterationOrder()
        self._offset, self._rest = 0, b""
        self._inode: int | None = None
        self.last: Record | None = None
        self.interval: dict[str, float] = {}
        self.measured: Record | None = None
        self.losses: list[tuple[int, float]] = []
        self.lines: deque[Record] = deque(maxlen=_NUM_LINES)
        self.alarms: dict[str, tuple[int, str]] = {}
        self.num_resumes = 0
        self._times: deque[tuple[int, float]] = deque(maxlen=_NUM_PACES + 1)

    def poll(self) -> None:
        """Read what is new.

        Raises:
            OSError: a file is there and cannot be read.
        """
        # While the run writes run.json it reads as empty; the earlier one still holds.
        self.about = read_object(self.folder / DESCRIPTION) or self.about
        self.summary = read_object(self.folder / SUMMARY)
        try:
            with (self.folder / METRICS).open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._start_anew()
                    self._inode = status.st_ino
                file.seek(self._offset)
                while chunk := file.read(_CHUNK_BYTES):
                    self._offset += len(chunk)
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    for line in lines:
                        self._take(line)
        except FileNotFoundError:
            self._start_anew()

    def _take(self, line: bytes) -> None:
        record = _record(line)
        if record is None:
            return
        iteration, at = record["iteration"], record["time"]
        if self._order.is_resumed_at(iteration):
            self._go_back(iteration)
        self.last = record
        self._note_time(iteration, at)
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss):
            self.losses.append((iteration, loss))
            if len(self.losses) > _MAX_LOSSES:
                del self.losses[1::2]
        self.interval |= {
            name: record[name] for name in ("lr", "grad_norm") if record.get(name) is not None
        }
        if "lr" in record:
            self.lines.append(record)
        if record.get("headlines"):
            self.measured = record
            for text in record["alarms"]:
                self._note_alarm(iteration, text)

    def _go_back(self, iteration: int) -> None:
        """Forget this iteration and later ones."""
        self.num_resumes += 1
        del self.losses[bisect_left(self.losses, iteration, key=lambda pair: pair[0]) :]
        while self.lines and self.lines[-1]["iteration"] >= iteration:
            self.lines.pop()
        self.alarms = {key: alarm for key, alarm in self.alarms.items() if alarm[0] < iteration}
        self._times.clear()
        self.measured = None

    def _note_time(self, iteration: int, at: float) -> None:
        if self._times and at - self._times[-1][1] < _SAME_TIME_SECONDS:
            self._times.pop()
        self._times.append((iteration, at))

    def _note_alarm(self, iteration: int, text: str) -> None:
        kind, _, rest = text.partition(": ")
        if kind in LIGHTS:  # not the "... and 3 more" at the end
            key = f"{kind}: {rest.partition(': ')[0]}"
            self.alarms.pop(key, None)
            self.alarms[key] = (iteration, text)
            if len(self.alarms) > _NUM_ALARMS:
                del self.alarms[next(iter(self.alarms))]

    # ------------------------------------------------------------ what follows from the lines

    @property
    def iteration(self) -> int:
        """The iteration of the newest line; 0 before the first."""
        return self.last["iteration"] if self.last else 0

    @property
    def total(self) -> int | None:
        """Iterations of the whole run; None if not known."""
        return int(number_of(self.about.get("train_iters")) or 0) or self._total

    @property
    def pace(self) -> float | None:
        """Seconds an iteration, the median of the last ones: pauses do not count. None if not known."""
        times = list(self._times)
        paces = sorted(((t - t0) / (i - i0), i - i0) for (i0, t0), (i, t) in pairwise(times))
        half = sum(count for _, count in paces) / 2
        for seconds, count in paces:
            half -= count
            if half <= 0:
                return seconds
        return None

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining iterations will take; None if not known, or if the run seems over."""
        if self.total is None or self.pace is None or self.has_ended or self.silent_seconds is not None:
            return None
        return max(0, self.total - self.iteration) * self.pace

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second over all ranks; None if not known."""
        tokens = number_of(self.about.get("tokens_per_iteration"))
        return tokens / self.pace if tokens and self.pace else None

    @property
    def lights(self) -> dict[str, bool | None]:
        """Whether the newest measurement is well, by kind of alarm; None where the kind is not measured.

        ``gradients`` is well where the newest gradient norm and loss are finite.
        """
        headlines = self.measured["headlines"] if self.measured else {}
        alarms = self.measured["alarms"] if self.measured else ()
        raised = {text.partition(": ")[0] for text in alarms}
        lights = {
            kind: False if kind in raised else (None if headlines.get(name) is None else True)
            for kind, name in LIGHTS.items()
        }
        numbers = [self.interval.get("grad_norm"), (self.last or {}).get("loss")]
        finite = all(math.isfinite(number) for number in numbers if number is not None)
        return lights | {"gradients": finite if numbers[0] is not None or not finite else None}

    @property
    def has_ended(self) -> bool:
        """Whether the summary is newer than the run's start and its lines: a resume leaves the old one."""
        ended = number_of(self.summary.get("time"))
        return ended is not None and ended >= max(self._started, self.last["time"] if self.last else 0.0)

    @property
    def _started(self) -> float:
        return number_of(self.about.get("started")) or 0.0

    @property
    def silent_seconds(self) -> float | None:
        """Seconds since the newest line, if that is long for this run; None otherwise."""
        if self.last is None or self.has_ended:
            return None
        times = [at for _, at in self._times]
        gaps = sorted(t - t0 for t0, t in pairwise(times))
        usual = gaps[len(gaps) // 2] if gaps else 0.0
        silence = time.time() - max(self.last["time"], self._started)
        return silence if silence > max(_SILENT_SECONDS, _SILENT_GAPS * usual) else None


def parallel_sizes(about: Record) -> str:
    """The parallel sizes in ``run.json`` as text, ``tensor 2, data 4``; empty if all are 1 or unknown."""
    sizes = about.get("parallel") or {}
    shown = {name: size for name, size in sizes.items() if size > 1}
    if shown.get("expert_tensor") == sizes.get("tensor"):  # Megatron's default
        shown.pop("expert_tensor", None)
    return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in shown.items())


def _record(line: bytes) -> Record | None:
    """A line without those of its fields that have a wrong type; None if it lacks iteration or time."""
    record = parse_object(line) or {}
    iteration, at = iteration_of(record), number_of(record.get("time"))
    if iteration is None or at is None or not math.isfinite(at):
        return None
    record |= {"iteration": iteration, "time": at}
    for name in ("loss", "grad_norm", "lr"):
        if name in record:
            # A loss or norm that is not known is left out by the run, so that null is NaN.
            number = math.nan if record[name] is None and name != "lr" else number_of(record[name])
            record[name] = number
            if number is None and name != "lr":
                del record[name]
    if not isinstance(record.get("headlines"), dict):
        record.pop("headlines", None)
    alarms = record.get("alarms")
    record["alarms"] = (
        [text for text in alarms if isinstance(text, str)] if isinstance(alarms, list) else []
    )
    return record
