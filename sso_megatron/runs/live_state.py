"""The present state of a run, read from its folder while the run writes to it."""

import json
import math
import os
import time
from bisect import bisect_left
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""A line of ``metrics.jsonl``."""

LIGHTS = {
    "solver": "not_converged",
    "radius": "radius_error",
    "activations": "activation_rms",
    "logits": "logit_max",
    "experts": "max_vio",
}
"""Kinds of alarms, and the headline that is known where the kind is measured."""

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
    """What is known of a run; ``poll`` brings it up to date.

    Reads ``metrics.jsonl`` onward from where it left off. A line whose iteration is not beyond the last one
    begins a resumed part, which replaces what came after. A file that is new or has become shorter is read
    from its start. Lines that are no records, as a killed run leaves them, are passed over.

    Attributes:
        folder: what ``--spectral-run-dir`` names.
        info: ``run.json``; empty if there is none.
        summary: ``summary.json``; None if there is none.
        last: the newest line; None before the first.
        interval: newest ``lr``, ``grad_norm`` by name.
        measured: the newest line with ``headlines``; None if there is none.
        losses: iterations and losses of the whole run, thinned out.
        lines: the newest lines with ``lr``.
        alarms: by kind and module, line and text of the newest alarms, the newest last.
        num_resumes: how often iterations went back.
    """

    def __init__(self, folder: Path, total: int | None = None) -> None:
        """Take the folder, which need not exist, and the iterations to make if ``run.json`` is silent."""
        self.folder = folder
        self._total = total
        self.info: dict[str, Any] = {}
        self.summary: dict[str, Any] | None = None
        self._start_anew()

    def _start_anew(self) -> None:
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
        """Read what is new."""
        self.info = _read_json(self.folder / "run.json") or self.info
        self.summary = _read_json(self.folder / "summary.json")
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
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
        if self.last is not None and iteration <= self.last["iteration"]:
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

    # ------------------------------------------------------------ what follows from it

    @property
    def iteration(self) -> int:
        """The last iteration that was written; 0 before the first."""
        return self.last["iteration"] if self.last else 0

    @property
    def total(self) -> int | None:
        """Iterations that the run shall make."""
        return int(_number(self.info.get("train_iters")) or 0) or self._total

    @property
    def pace(self) -> float | None:
        """Seconds an iteration: the median of the last iterations, so that pauses do not count."""
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
        """Time that the iterations to come will take; None if not known, or if none seem to come."""
        if self.total is None or self.pace is None or self.has_ended or self.silent_seconds is not None:
            return None
        return max(0, self.total - self.iteration) * self.pace

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second over all ranks; None if not known."""
        tokens = _number(self.info.get("tokens_per_iteration"))
        return tokens / self.pace if tokens and self.pace else None

    @property
    def lights(self) -> dict[str, bool | None]:
        """By kind of alarm: whether all is well; None where it is not measured."""
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
        """Whether the summary is there and was written after the start and the lines that are."""
        ended = _number((self.summary or {}).get("time"))
        return ended is not None and ended >= max(self._started, self.last["time"] if self.last else 0.0)

    @property
    def _started(self) -> float:
        return _number(self.info.get("started")) or 0.0

    @property
    def silent_seconds(self) -> float | None:
        """Since when there was no line, if that is long for this run; None otherwise."""
        if self.last is None or self.has_ended:
            return None
        times = [at for _, at in self._times]
        gaps = sorted(t - t0 for t0, t in pairwise(times))
        usual = gaps[len(gaps) // 2] if gaps else 0.0
        silence = time.time() - max(self.last["time"], self._started)
        return silence if silence > max(_SILENT_SECONDS, _SILENT_GAPS * usual) else None


def parallel_sizes(info: Record) -> str:
    """The layout that ``run.json`` tells, as ``tensor 2, data 4``; empty if all is 1 or unknown."""
    sizes = info.get("parallel") or {}
    shown = {name: size for name, size in sizes.items() if size > 1}
    if shown.get("expert_tensor") == sizes.get("tensor"):  # so it is unless somebody says otherwise
        shown.pop("expert_tensor", None)
    return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in shown.items())


def _record(line: bytes) -> Record | None:
    """A line whose fields are of the kinds that they should be, without those that are not."""
    try:
        record = json.loads(line)
        record |= {"iteration": int(record["iteration"]), "time": float(record["time"])}
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    if not math.isfinite(record["time"]):
        return None
    for name in ("loss", "grad_norm", "lr"):
        if name in record:
            # As runs.writer writes what is not a number; what is not known at all is not there.
            number = math.nan if record[name] is None and name != "lr" else _number(record[name])
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


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    """A file of one JSON object; None if it is not there or half written."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
