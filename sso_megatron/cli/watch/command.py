"""``sso-megatron watch`` follows a run by the files that it writes."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sso_megatron.cli.shared.errors import discard_output
from sso_megatron.cli.watch.screen import Screen, plain_line, status
from sso_megatron.runs.live_state import RunState

_POLL_SECONDS = 0.5
_PLAIN_LINES = 100  # most lines of a whole run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron watch``."""
    parser.description = (
        "Follow a run that was started with --spectral-run-dir RUN, until it ends: one screen on a "
        "terminal, a line now and then elsewhere. Starts nothing and changes nothing."
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run's folder; need not exist yet")
    parser.add_argument("--once", action="store_true", help="show the present state and end")
    parser.add_argument("--plain", action="store_true", help="lines, on a terminal, too")


def run(options: argparse.Namespace) -> int:
    """Run the ``watch`` command; return when the run has ended."""
    folder: Path = options.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name what --spectral-run-dir named")
    state = RunState(folder)
    try:
        state.poll()
        if options.once and not (state.about or state.last or state.summary):
            raise ValueError(
                f"{folder} has no run.json, metrics.jsonl or summary.json; start the run with "
                f"--spectral-run-dir {folder}, or wait for it without --once"
            )
        exit_on_signals()  # or the cursor would stay hidden
        follow(state, lambda: options.once or state.has_ended, plain=options.plain)
    except BrokenPipeError:
        discard_output()
    return 0


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, unless they are ignored, as SIGHUP is under ``nohup``."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, frame: sys.exit(128 + received))


def follow(state: RunState, is_over: Callable[[], bool], plain: bool = False) -> None:
    """Show a run until it is over, and its last state at the end.

    Args:
        state: state of the run, which this function polls.
        is_over: whether the run is over; called before each poll.
        plain: print lines on a terminal, too, instead of a screen. A file always gets lines.
    """
    console = Console()
    # Not console.is_terminal: FORCE_COLOR makes that true for files.
    if plain or not sys.stdout.isatty() or console.is_dumb_terminal:
        _follow_in_lines(state, is_over)
        return
    live = Live(Screen(state), console=console, auto_refresh=False)
    try:  # "with live" would leave the cursor hidden if Ctrl-C came during its first drawing
        live.start()
        while True:
            over = is_over()
            state.poll()
            live.refresh()
            if over:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        live.stop()


def _follow_in_lines(state: RunState, is_over: Callable[[], bool]) -> None:
    shown, said, resumes = 0, "", 0
    raised: set[str] = set()
    checked: int | None = None  # iteration of the last measurement whose alarms were printed
    while True:
        over = is_over()
        state.poll()
        if state.num_resumes != resumes or state.iteration < shown:
            resumes, shown, checked = state.num_resumes, 0, None
        step = max(1, state.about.get("log_interval") or 1, (state.total or 0) // _PLAIN_LINES)
        is_due = over or shown == 0 or state.iteration // step > shown // step
        if state.iteration > shown and is_due:
            shown = state.iteration
            print(plain_line(state), flush=True)
        if state.measured and state.measured["iteration"] != checked:
            newest = state.measured["iteration"]
            checked = newest - 1 if checked is None else checked
            for key, (iteration, text) in state.alarms.items():
                if iteration > checked and key not in raised:
                    print(f"WARN iteration {iteration}: {text}", flush=True)
            raised = {key for key, (iteration, _) in state.alarms.items() if iteration == newest}
            checked = newest
        kind = _kind_of_status(state)
        if kind not in (said, "running"):
            print(status(state), flush=True)
        said = kind
        if over:
            return
        time.sleep(_POLL_SECONDS)


def _kind_of_status(state: RunState) -> str:
    """Return the status without its numbers; a status is printed only when this text changes."""
    if state.silent_seconds is not None:
        return "silent"
    return "running" if status(state).startswith("running") else status(state)
