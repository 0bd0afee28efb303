"""``sso-megatron watch``, on real runs and on files that grow while it looks, as its users see it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.megatron_runs import MOE, Megatron, tiny
from helpers.processes import HANGS_AFTER
from helpers.runs.run_folders import OFF_RADIUS, WEIGHT, append, begin, interval, record, state_of
from helpers.terminal import Terminal
from sso_megatron.runs.live_state import LIGHTS

pytestmark = pytest.mark.slow

WATCH = [sys.executable, "-m", "sso_megatron.cli.main", "watch"]
# ---------------------------------------------------------------- real runs


def test_a_real_run_on_a_terminal(megatron: Megatron) -> None:
    """A model with experts, from before its folder is there to its end; healthy all the way."""
    folder = megatron.base / f"run{megatron.count + 1}"
    runs = []
    with Terminal([*WATCH, str(folder)]) as terminal:
        terminal.wait_for("waiting: there is no folder")  # a long path has a line of its own
        flags = tiny(*MOE, "--train-iters", 40, "--log-interval", 5, "--log-spectral-metrics", 5)
        flags += ["--eval-iters", "1", "--spectral-mup-init"]
        thread = threading.Thread(target=lambda: runs.append(megatron.train(flags)))
        thread.start()
        seen = terminal.wait_for("gradients ✓ ok", "running")
        assert terminal.finish() == 0
        thread.join()
    (run,) = runs
    assert run.folder == folder
    assert any("loss" in line for line in seen)
    screen = "\n".join(terminal.lines)
    val_loss = run.summary["val_loss"]
    assert f"ended after 40 iterations, validation loss {val_loss:.3f}" in screen
    assert all(f"{name} ✓ ok" in screen for name in LIGHTS)
    assert f"loss {run.losses[-1]:.3f}" in screen and f"from {run.losses[0]:.3f}" in screen
    assert terminal.written.endswith(b"\x1b[?25h"), "the cursor is back"


def test_a_real_run_that_is_sick(megatron: Megatron) -> None:
    """A learning rate a hundred times too high; alarms name modules, and stop ends the run."""
    flags = tiny("--train-iters", 40, "--lr", 3, "--lr-warmup-iters", 0, "--lr-decay-style", "constant")
    flags += ["--log-spectral-metrics", "2"]
    sick = once(megatron.train(flags).folder)
    assert sick.returncode == 0 and " WARN " in sick.stdout
    assert re.search(r"^WARN iteration 40: \w+: decoder\.layers\.[01][\w.]*(\[\w+\])?: ", sick.stdout, re.M)
    stopping = [*flags, "--spectral-health", "stop", "--spectral-run-dir", "."]
    stopped = once(megatron.run(stopping, fails=True).folder)
    assert re.search("^stopped by --spectral-health after [0-9]+ iterations$", stopped.stdout, re.M)


def test_a_real_resume_in_the_same_folder(megatron: Megatron, tmp_path: Path) -> None:
    """Saved at 8 of 12, resumed from there: 9 to 12 are there twice, and the later lines count."""
    folder = tmp_path / "run"
    folder.mkdir()
    flags = tiny("--log-interval", 2, "--spectral-run-dir", folder, "--save", tmp_path / "saved")
    flags += ["--save-interval", "8"]
    megatron.run([*flags, "--train-iters", "12"])
    first = state_of(folder)
    assert first.has_ended and first.num_resumes == 0
    resume = ["--load", str(tmp_path / "saved"), "--ckpt-step", "8"]
    megatron.run([*flags, "--train-iters", "16", *resume, "--lr", "2e-3", "--override-opt-param-scheduler"])
    before, after = dict(first.losses), {}
    first.poll()
    for line in (folder / "metrics.jsonl").read_text().splitlines()[12:]:
        after[json.loads(line)["iteration"]] = json.loads(line)["loss"]
    assert list(after) == list(range(9, 17)) and after[12] != before[12]
    assert first.losses == sorted((before | after).items())
    assert first.num_resumes == 1 and first.has_ended and first.iteration == 16
    assert state_of(folder).losses == first.losses
    summary, run = folder / "summary.json", folder / "run.json"
    before, started = json.loads(summary.read_text()), json.loads(run.read_text())["started"]
    assert Path(json.loads(run.read_text())["save"]).is_absolute()
    resume = ["--load", str(tmp_path / "saved"), "--lr", "2e-3", "--override-opt-param-scheduler"]
    megatron.run([*flags, "--train-iters", "16", *resume])
    assert json.loads(run.read_text())["started"] > started
    after = json.loads(summary.read_text())
    assert after.pop("time") > before.pop("time") and after == before, "no iteration was made"
    assert state_of(folder).has_ended


# ---------------------------------------------------------------- the screen


def test_health_on_the_screen(tmp_path: Path) -> None:
    """Lights and alarms with a word and a sign; colours and reverse video only add to that."""
    begin(tmp_path)
    append(tmp_path, *interval(1, time.time() - 5))
    with Terminal([*WATCH, str(tmp_path)]) as terminal:
        terminal.wait_for(
            "5/40", "solver ✓ ok", "radius ✓ ok", "logits ✓ ok", "experts -", "gradients ✓ ok"
        )
        assert f"{tmp_path.name}  sso, 2 ranks (tensor 2)" in terminal.lines[0]
        append(tmp_path, *interval(6, alarms=[OFF_RADIUS, "... and 3 more"]))
        lines = terminal.wait_for("10/40", "radius ! WARN", "! 10 radius:", WEIGHT, "tokens/s", "s left")
        assert any(line.startswith("loss 5.000  █") and line.endswith("▁  from 5.900") for line in lines)
        (row,) = [y for y, line in enumerate(terminal.screen.display) if "WARN" in line]
        column = terminal.screen.display[row].index("WARN")
        assert terminal.screen.buffer[row][column].reverse
        append(tmp_path, *interval(11, grad_norm=math.nan))
        lines = terminal.wait_for("15/40", "radius ✓ ok", "gradients ! WARN")
        assert any(line.startswith("  10 radius:") for line in lines), "what was, without the sign"
        append(tmp_path, *interval(16))
        terminal.wait_for("20/40", "gradients ✓ ok")


@pytest.mark.parametrize(("columns", "rows"), [(60, 16), (100, 12)])
def test_small_terminals_without_colour(tmp_path: Path, columns: int, rows: int) -> None:
    """Everything of the upper part is there, and alarms as far as there is room."""
    begin(tmp_path)
    kinds = ("radius", "activations", "logits", "experts", "solver")
    alarms = [f"{kind}: {WEIGHT}.{kind}: something is wrong with this one" for kind in kinds]
    append(tmp_path, *interval(1, time.time() - 10), *interval(6, alarms=alarms))
    environment = os.environ | {"NO_COLOR": "1"}
    with Terminal([*WATCH, str(tmp_path)], columns, rows, environment) as terminal:
        wanted = [f"{kind} ! WARN" for kind in kinds]
        lines = terminal.wait_for("10/40", "tokens/s", "gradients ✓ ok", *wanted, "! 10 radius:")
        assert not any("..." in line or "…" in line for line in lines)
        terminal.press(b"\x03")
        assert terminal.finish() == 130
        cells = [terminal.screen.buffer[y][x] for y in range(rows) for x in range(columns)]
        assert {cell.fg for cell in cells} == {cell.bg for cell in cells} == {"default"}


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    begin(tmp_path)
    append(tmp_path, *interval(1), *interval(6, grad_norm=math.inf))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with Terminal([*WATCH, str(tmp_path)], env=environment) as terminal:
        terminal.wait_for("10/40", "solver + ok", "gradients ! WARN", "loss 5.000  #*")
        assert terminal.written.isascii()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_leaves_cleanly(tmp_path: Path, number: int, code: int) -> None:
    """Also while there is nothing to show yet."""
    with Terminal([*WATCH, str(tmp_path / "later")]) as terminal:
        terminal.wait_for("waiting")
        terminal.process.send_signal(number)
        assert terminal.finish() == code
        assert terminal.written.endswith(b"\x1b[?25h"), "the cursor is back"
        assert "Traceback" not in "\n".join(terminal.lines)


def test_a_run_that_has_died(tmp_path: Path) -> None:
    begin(tmp_path, started=time.time() - 4000)
    append(tmp_path, *interval(1, time.time() - 3900), *interval(6, time.time() - 3790))
    with Terminal([*WATCH, "--once", str(tmp_path)]) as terminal:
        assert terminal.finish() == 0
        silence = r"no new line for 1 h \d\d min: the run has died, or evaluates or saves"
        assert re.search(silence, terminal.lines[1])
        assert not any(" left" in line for line in terminal.lines)


# ---------------------------------------------------------------- lines


@contextlib.contextmanager
def piped(folder: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """``watch`` behind pipes; killed in the end, so that no read waits for ever."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*WATCH, str(folder)], stdout=pipe, stderr=pipe, text=True, env=env) as process:
        timer = threading.Timer(HANGS_AFTER, process.kill)
        timer.start()
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
            timer.cancel()


def test_lines_through_a_pipe(tmp_path: Path) -> None:
    """Under Slurm, and though a variable asks for colours; a line once its interval is complete."""
    begin(tmp_path)
    environment = os.environ | {"SLURM_JOB_ID": "7", "FORCE_COLOR": "1"}
    with piped(tmp_path, environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting for the first iteration\n"
        append(tmp_path, *interval(1, time.time() - 5))
        line = process.stdout.readline()
        assert line == "iteration 5/40  loss 5.500  lr 2.00e-02  gradient norm 0.25  health ok\n"
        text = json.dumps(record(10, alarms=[OFF_RADIUS]))
        append(tmp_path, *interval(6)[:-1], text[:30])
        time.sleep(1.5)
        append(tmp_path, text[30:] + "\n")
        line = process.stdout.readline()
        assert line.startswith("iteration 10/40  loss 5.000") and line.endswith("left  WARN radius\n")
        assert process.stdout.readline() == f"WARN iteration 10: {OFF_RADIUS}\n"
        append(tmp_path, *interval(11, alarms=[OFF_RADIUS]), *interval(6))
        assert process.stdout.readline().startswith("iteration 10/40"), "resumed"
        append(tmp_path, *interval(11))
        (tmp_path / "summary.json").write_text(json.dumps({"time": time.time(), "val_loss": 2.5}))
        rest = process.stdout.read().splitlines()
        assert rest[0].startswith("iteration 15/40") and rest[0].endswith("health ok")
        assert rest[1:] == ["ended after 15 iterations, validation loss 2.500"]
    assert process.returncode == 0


@pytest.mark.parametrize(("flags", "term"), [(["--plain"], "xterm"), ([], "dumb")])
def test_lines_on_a_terminal(tmp_path: Path, flags: list[str], term: str) -> None:
    begin(tmp_path)
    append(tmp_path, *interval(1))
    (tmp_path / "summary.json").write_text(json.dumps({"time": time.time(), "val_loss": None}))
    with Terminal([*WATCH, *flags, str(tmp_path)], env=os.environ | {"TERM": term}) as terminal:
        assert terminal.finish() == 0
        assert b"\x1b" not in terminal.written
        assert [line.split("  ")[0] for line in terminal.lines] == [
            "iteration 5/40",
            "ended after 5 iterations",
        ]


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """``sso-megatron watch RUN | head -1``."""
    begin(tmp_path)
    append(tmp_path, *interval(1))
    with piped(tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("iteration 5/40")
        process.stdout.close()
        append(tmp_path, *interval(6))
        assert process.stderr.read() == ""
    assert process.returncode == 0


def once(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WATCH, "--once", str(folder)], capture_output=True, text=True, timeout=HANGS_AFTER
    )


def test_once(tmp_path: Path) -> None:
    """The state of a run that goes on."""
    begin(tmp_path)
    now = time.time() + HANGS_AFTER  # however long the command takes to start, that is no silence
    append(tmp_path, *interval(1, now - 5), *interval(6, now, alarms=[OFF_RADIUS]), '{"iteration": 11, "lo')
    ended = once(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == (
        "iteration 10/40  loss 5.000  lr 2.00e-02  gradient norm 0.25  1 s an iteration  2,048 tokens/s  "
        f"30 s left  WARN radius\nWARN iteration 10: {OFF_RADIUS}\n"
    )


def test_what_is_no_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, why in ((tmp_path / "nowhere", "has no run.json"), (file, "is not a folder")):
        ended = once(path)
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr.startswith(f"sso-megatron watch: error: {path} {why}")
        assert ended.stderr.count("\n") == 1


def test_fields_of_the_wrong_kind(tmp_path: Path) -> None:
    begin(tmp_path, started=None, parallel=None, log_interval=None, train_iters="x")
    odd = ['{"iteration": 1e400, "time": 1}\n', '{"iteration": 3, "time": 1e400}\n', "5\n"]
    append(tmp_path, *odd, *interval(1, loss="x", headlines=5, alarms=3, lr=[], grad_norm={}))
    ended = once(tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "iteration 5\n"), ended.stderr
