"""What is read of a run that goes on: only what is new, whatever is odd; and how it is told."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from helpers.runs.run_folders import OFF_RADIUS, append, begin, interval, record, state_of
from sso_megatron.cli.train import first_run
from sso_megatron.cli.watch import command as watch
from sso_megatron.cli.watch.screen import duration, sparkline
from sso_megatron.runs.alarms import KINDS
from sso_megatron.runs.live_state import LIGHTS, RunState
from sso_megatron.runs.tables import headlines

# ---------------------------------------------------------------- the files


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    """The old part is overwritten with nonsense of the same length, which nobody notices."""
    append(tmp_path, *interval(1))
    state = state_of(tmp_path)
    path = tmp_path / "metrics.jsonl"
    with path.open("r+b") as file:
        file.write(b"?" * path.stat().st_size)
    append(tmp_path, *interval(6))
    state.poll()
    assert [iteration for iteration, _ in state.losses] == list(range(1, 11))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_begins_anew(tmp_path: Path, replaced: bool) -> None:
    """Emptied, or replaced by another that may be longer."""
    append(tmp_path, *interval(1), *interval(6))
    state = state_of(tmp_path)
    path = tmp_path / "metrics.jsonl"
    if replaced:
        path.rename(tmp_path / "old.jsonl")
        append(tmp_path, *interval(1), *interval(6), *interval(11))
    else:
        path.write_text("")
        append(tmp_path, *interval(1))
    state.poll()
    assert state.num_resumes == 0
    assert [iteration for iteration, _ in state.losses] == list(range(1, 16 if replaced else 6))


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    """A killed run leaves half a line, behind which the next one begins a new line."""
    append(
        tmp_path, record(1), '{"iteration": 2, "lo\n', "[]\n", "\n", '{"loss": 1.0}\n', record(2, loss=None)
    )
    state = state_of(tmp_path)
    assert state.iteration == 2 and len(state.losses) == 1


def test_what_is_ignored_stays_so() -> None:
    """``nohup sso-megatron first-run`` outlives its terminal."""
    numbers = signal.SIGHUP, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        watch.exit_on_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_training_goes_on_without_its_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # which cannot be read
    done = tmp_path / "done"
    command = [sys.executable, "-c", f"import time; time.sleep(1); open({str(done)!r}, 'w')"]
    assert first_run._train(command, tmp_path, 10) == 0
    assert done.exists() and "progress is not shown any more" in capsys.readouterr().err


def test_the_pace_is_that_of_the_last_iterations(tmp_path: Path) -> None:
    """A slow start, a pause for an evaluation and a resume days later do not count."""
    begin(tmp_path, train_iters=100)
    append(tmp_path, record(1, 0.0))
    for k in range(8):
        append(tmp_path, *interval(5 * k + 2, 30.0 + 10 * k + (500 if k > 4 else 0)))
    state = state_of(tmp_path)
    assert state.pace == 2.0 and state.tokens_per_second == 1024.0
    for k in range(4):
        append(tmp_path, *interval(5 * k + 22, 9e5 + 5 * k))
    state.poll()
    assert state.iteration == 41 and state.pace == 1.0


def test_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    """Lines and alarms are the new part's from the first iteration that is done again, itself included."""
    early = OFF_RADIUS.replace("layers.3", "layers.0")
    append(tmp_path, *interval(1, alarms=[early]), *interval(6, alarms=[OFF_RADIUS]))
    state = state_of(tmp_path)
    assert list(state.alarms.values()) == [(5, early), (10, OFF_RADIUS)]
    append(tmp_path, record(10, lr=0.5))
    state.poll()
    assert state.num_resumes == 1
    assert list(state.alarms.values()) == [(5, early)]
    assert [(line["iteration"], line["lr"]) for line in state.lines] == [(5, 0.02), (10, 0.5)]


def test_time_left(tmp_path: Path) -> None:
    begin(tmp_path, train_iters=None)
    now = time.time()
    append(tmp_path, *interval(1, now - 10), *interval(6, now))
    assert state_of(tmp_path).seconds_left is None
    state = RunState(tmp_path, total=20)
    state.poll()
    assert state.seconds_left == pytest.approx(20.0)
    begin(tmp_path, train_iters=15)
    state.poll()
    assert state.seconds_left == pytest.approx(10.0), "run.json knows better"


def test_a_summary_of_the_part_before(tmp_path: Path) -> None:
    """It stays in the folder when a run is resumed, and says nothing of the part that goes on."""
    begin(tmp_path)
    append(tmp_path, *interval(1))
    (tmp_path / "summary.json").write_text(json.dumps({"time": time.time(), "val_loss": None}))
    assert state_of(tmp_path).has_ended
    time.sleep(0.01)
    begin(tmp_path)
    assert not state_of(tmp_path).has_ended, "resumed, no iteration yet"
    append(tmp_path, *interval(6))
    assert not state_of(tmp_path).has_ended


def test_a_long_run_is_thinned_out(tmp_path: Path) -> None:
    append(tmp_path, *(record(i, float(i)) for i in range(1, 20001)))
    state = state_of(tmp_path)
    assert 2000 < len(state.losses) <= 4096
    assert state.losses[0][0] == 1 and state.losses[-1][0] >= 19990
    assert len(sparkline(state.losses, 50)) == 50


# ---------------------------------------------------------------- texts


def test_sparkline() -> None:
    assert sparkline([(1, 8.0), (2, 4.5), (3, 1.0)], 40) == "█▅▁"
    assert sparkline([(i, float(i)) for i in range(80)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(i, float(i)) for i in range(80)], 8, ascii_only=True) == "_.-~=+*#"
    assert sparkline([(7, 2.0)], 40) == "▁"
    assert sparkline([(1, 2.0), (1000, 1.0), (1001, 0.0)], 3) == "█▁", "a gap takes no room"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (3599.0, "59 min 59 s"),
        (7500.0, "2 h 05 min"),
        (93600.0, "1 d 2 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_kind_of_alarm_has_a_light() -> None:
    assert set(LIGHTS) == set(KINDS)
    assert set(LIGHTS.values()) <= headlines({}).keys()
