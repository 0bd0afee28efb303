"""Shows the state of a run as one screen of a terminal, and as one line."""

from collections.abc import Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sso_megatron.runs.live_state import RunState, parallel_sizes

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_SIGNS = {
    True: ("✓", "+", "ok", "cyan"),
    False: ("!", "!", "WARN", "bold reverse"),
    None: ("", "", "-", "dim"),
}
_SPARKLINE_WIDTH = 50
_LOSS_TEXT_WIDTH = 30
_MAX_ALARMS, _MAX_LINES = 5, 8
# Rows that all alarms but the first leave for the newest lines, one of them for the names of columns.
_ROWS_FOR_LINES = 4


class Screen:
    """Shows a run on one screen. Rich asks for its contents at every refresh, with the terminal's size."""

    def __init__(self, state: RunState) -> None:
        """Show this state, as it is at each refresh."""
        self.state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
        """Yield the screen's parts from top to bottom, alarms and newest lines as far as they fit."""
        state = self.state
        rows_left = console.size.height - 1
        parts: list[RenderableType] = [_heading(state), _status(state)]
        if state.last is not None:
            lights = (_light(*light, options.ascii_only) for light in state.lights.items())
            parts += [_bar(state), _numbers(state, options), Columns(lights, padding=(0, 3))]
        for part in parts:
            rows_left -= len(console.render_lines(part, options))
            yield part
        newest_first = sorted(state.alarms.values(), key=lambda alarm: -alarm[0])
        for place, alarm in enumerate(newest_first[:_MAX_ALARMS]):
            part = _alarm(state, *alarm)
            height = len(console.render_lines(part, options))
            if rows_left - height < (_ROWS_FOR_LINES if place else 0):
                break
            rows_left -= height
            yield part
        num_lines = min(_MAX_LINES, len(state.lines), rows_left - 1)
        if num_lines > 0:
            yield _lines(list(state.lines)[-num_lines:])


def _heading(state: RunState) -> Text:
    about = state.about
    text = Text(overflow="fold")
    text.append(state.folder.resolve().name, style="bold")
    if about:
        layout = parallel_sizes(about)
        text.append(f"  {about.get('optimizer', '')}, {count(about.get('world_size', 1), 'rank')}")
        text.append(f" ({layout})" if layout else "")
    return text


def _status(state: RunState) -> Text:
    return Text(status(state), style="" if state.silent_seconds is None else "bold reverse")


def _bar(state: RunState) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    total, left = state.total, state.seconds_left
    bar = ProgressBar(total=total, completed=min(state.iteration, total or 1)) if total else Text("")
    texts = [_iteration(state)]
    if left is not None:
        texts.append(f"{duration(left)} left")
    grid.add_row(bar, "  ".join(texts))
    return grid


def _iteration(state: RunState) -> str:
    return f"{state.iteration}/{state.total}" if state.total else f"iteration {state.iteration}"


def _numbers(state: RunState, options: ConsoleOptions) -> RenderableType:
    loss = (state.last or {}).get("loss")
    width = min(_SPARKLINE_WIDTH, options.max_width - _LOSS_TEXT_WIDTH)
    first = Text("loss not known" if loss is None else f"loss {loss:.3f}")
    if state.losses and width > 0:
        first.append(f"  {sparkline(state.losses, width, options.ascii_only)}", style="cyan")
        first.append(f"  from {state.losses[0][1]:.3f}")
    return Group(first, Text("   ".join(_rates(state))))


def _rates(state: RunState) -> list[str]:
    texts = []
    if "lr" in state.interval:
        texts.append(f"lr {state.interval['lr']:.2e}")
    if "grad_norm" in state.interval:
        texts.append(f"gradient norm {state.interval['grad_norm']:.3g}")
    if state.pace is not None:
        texts.append(f"{state.pace:.3g} s an iteration")
    if state.tokens_per_second is not None:
        texts.append(f"{state.tokens_per_second:,.0f} tokens/s")
    return texts


def _light(name: str, is_well: bool | None, ascii_only: bool) -> Text:
    sign, ascii_sign, word, style = _SIGNS[is_well]
    text = Text(f"{name} ", no_wrap=True)
    text.append(f"{ascii_sign if ascii_only else sign} {word}".strip(), style=style)
    return text


def _alarm(state: RunState, iteration: int, text: str) -> Table:
    """Return an alarm, dim and without a sign if the newest measurement did not raise it again."""
    is_on = state.measured is not None and state.measured["iteration"] == iteration
    grid = Table.grid(padding=(0, 1))
    grid.add_row("!" if is_on else " ", str(iteration), Text(text, overflow="fold"))
    grid.style = "" if is_on else "dim"
    return grid


def _lines(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    formats = {"iteration": "d", "loss": ".4f", "lr": ".2e", "grad_norm": ".3g"}
    for name in formats:
        table.add_column(name.replace("grad_norm", "gradient norm"), justify="right", header_style="dim")
    for line in lines:
        table.add_row(
            *("" if line.get(name) is None else format(line[name], form) for name, form in formats.items())
        )
    return table


def status(state: RunState) -> str:
    """Say what the run is doing, in a few words."""
    if state.has_ended and state.summary is not None:
        verb = "stopped by --spectral-health" if "stopped" in state.summary else "ended"
        text = f"{verb} after {count(state.iteration, 'iteration')}"
        if state.summary.get("val_loss") is not None:
            text += f", validation loss {state.summary['val_loss']:.3f}"
        return text
    if state.last is None:
        if not state.folder.is_dir():
            return f"waiting: there is no folder {state.folder} yet"
        return "waiting for the first iteration"
    if state.silent_seconds is not None:
        return f"no new line for {duration(state.silent_seconds)}: the run has died, or evaluates or saves"
    return "running" + (f", resumed {count(state.num_resumes, 'time')}" if state.num_resumes else "")


def plain_line(state: RunState) -> str:
    """Sum up the state in one line."""
    loss = (state.last or {}).get("loss")
    parts = [f"iteration {_iteration(state).removeprefix('iteration ')}"]
    parts += [] if loss is None else [f"loss {loss:.3f}"]
    parts += _rates(state)
    if state.seconds_left is not None:
        parts.append(f"{duration(state.seconds_left)} left")
    lights = state.lights
    bad = [kind for kind, is_well in lights.items() if is_well is False]
    if bad:
        parts.append(f"WARN {', '.join(bad)}")
    elif any(lights.values()):
        parts.append("health ok")
    return "  ".join(parts)


def sparkline(losses: Sequence[tuple[int, float]], width: int, ascii_only: bool = False) -> str:
    """Draw losses as a curve of at most ``width`` characters: means over equal parts of the iterations.

    Args:
        losses: ascending iterations and their finite losses; at least one.
        width: largest number of characters.
        ascii_only: whether the terminal has no Unicode.
    """
    first, last = losses[0][0], losses[-1][0]
    width = min(width, len(losses))
    parts: list[list[float]] = [[] for _ in range(width)]
    for iteration, loss in losses:
        parts[(iteration - first) * width // (last - first + 1)].append(loss)
    means = [sum(part) / len(part) for part in parts if part]
    low, span = min(means), max(means) - min(means)
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    return "".join(
        blocks[int((mean - low) / span * (len(blocks) - 1) + 0.5) if span else 0] for mean in means
    )


def duration(seconds: float) -> str:
    """Format a time as ``45 s``, ``3 min 20 s``, ``2 h 05 min`` or ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def count(number: int, noun: str) -> str:
    """Format a number of things: ``1 rank``, ``2 ranks``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
