"""Formats a plan as rows of text, for a terminal and for a page."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sso_megatron.cli.plan.speed import Speed
from sso_megatron.mcore.plan.records import CutKind, Matrix, Parameter, Plan

_LAYER = re.compile(r"(?<=layers\.)(\d+)(?=\.)")
_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=linear_fc[12]\.weight)\d+|(?<=linear_fc[12]\.bias)\d+")


def unit(value: float, suffix: str = "") -> str:
    """Return a number with three digits and a decimal prefix."""
    if not value:
        return f"0 {suffix}".strip()
    power = max(0, min(5, int(math.log10(abs(value)) // 3)))
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{suffix}".strip()


@dataclass(frozen=True)
class Row:
    """A row of the table: parameters that differ by the numbers of layers and experts alone.

    Attributes:
        name: name of the parameters, with ranges for numbers.
        first: the first of the parameters.
        count: number of parameters.
        owners: data-parallel ranks that own the parameters.
    """

    name: str
    first: Parameter
    count: int
    owners: tuple[int, ...]


def rows_of(parameters: Sequence[Parameter], is_full: bool) -> list[Row]:
    """Return the rows of the table of parameters, in the model's order."""
    alike: dict[Any, list[Parameter]] = {}
    for p in parameters:
        name = p.name if is_full else _EXPERT.sub("*", _LAYER.sub("*", p.name))
        matrices = tuple((m.kind, m.shape, m.tp_mode) for m in p.matrices)
        key = (name, p.shape, p.stored, p.route, p.reason, p.is_copy, matrices)
        alike.setdefault(key, []).append(p)
    rows = []
    for same in alike.values():
        name = same[0].name
        for pattern in (_LAYER, _EXPERT):
            numbers = {int(found[0]) for p in same if (found := pattern.search(p.name))}
            if len(numbers) > 1:
                name = pattern.sub(ranges(numbers), name, count=1)
        owners = tuple(sorted({p.dp_owner for p in same if p.dp_owner is not None}))
        rows.append(Row(name, same[0], len(same), owners))
    return rows


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text in ranges: ``0-3,5`` for 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def size(shape: Sequence[int]) -> str:
    """Return a shape as text, such as ``2048 x 512``."""
    return " x ".join(map(str, shape))


def matrices_of(p: Parameter) -> list[tuple[int, Matrix, str]]:
    """Return for each kind and shape the number of matrices, one of them, and the modes of all."""
    alike: dict[Any, list[Matrix]] = {}
    for m in p.matrices:
        alike.setdefault((m.kind, m.shape), []).append(m)
    found = []
    for same in alike.values():
        modes = ", ".join(dict.fromkeys(m.tp_mode for m in same))
        found.append((len(same), same[0], modes))
    return found


def summary(plan: Plan, speed: Speed | None) -> list[tuple[str, str]]:
    """Return the totals, each as its name and its text."""
    busiest, fullest = plan.busiest, plan.fullest
    most = max(rank.load.received for rank in plan.ranks)
    layout = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in plan.parallel.items() if n > 1)
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.matrix_kinds.items())
    state = fullest.load
    lines = {
        "ranks": f"{plan.world_size} ({layout})" if layout else "1",
        "parameters": f"{plan.num_parameters:,}, of which {plan.num_without_embeddings:,} are in neither "
        "embeddings nor output layer",
        "matrices": f"{sum(plan.matrix_kinds.values())}: {kinds}",
        "step": f"{unit(busiest.load.flops, 'flop')} on the rank with most flops; {unit(most, 'B')} from "
        "its tensor-parallel group on the rank with most bytes; forward and backward "
        f"{unit(plan.model_flops / plan.world_size, 'flop')} a rank, {plan.tokens:,} tokens in all",
        "optimizer memory": f"{unit(state.state, 'B')} on the rank with most: the spectral state "
        f"{unit(state.momentum, 'B')}, AdamW's {unit(state.adamw, 'B')}, float32 weights "
        f"{unit(state.masters, 'B')}",
    }
    replicas = len({rank.data for rank in plan.ranks})
    if plan.is_sharded and replicas > 1:
        lines["balance"] = (
            f"the busiest of {replicas} data-parallel ranks has {plan.imbalance():.2f} times the mean work"
        )
    if speed is not None:
        model, step = speed.seconds(plan)
        lines["share of the time"] = (
            f"{speed.share(plan):.2%}: step {1e3 * step:.3g} ms, forward and backward {1e3 * model:.3g} ms "
            "at the speeds given; what memory bounds is left out"
        )
    return list(lines.items())


_COLUMNS = ("parameter", "number", "shape", "route", "why", "matrices", "radius", "scale", "tp mode")

CUT_COLUMNS = ("stages", "matrices", "shape", "cut", "number", "tp mode", "why", "costs, flop of a rank")
"""Heads of the columns that ``cut_rows`` fills."""


def heads(plan: Plan) -> tuple[str, ...]:
    """Return the heads of the columns that ``cells`` fills."""
    return (*_COLUMNS, "dp owner") if plan.is_sharded else _COLUMNS


def cells(plan: Plan, row: Row) -> list[str]:
    """Return the texts in a row of the table of parameters."""
    parts = matrices_of(row.first)
    found = [
        row.name,
        str(row.count),
        size(row.first.shape),
        row.first.route,
        row.first.reason + (" (copy)" if row.first.is_copy else ""),
        "\n".join(f"{n} {m.kind} {size(m.shape)}" for n, m, _ in parts),
        "\n".join(_number(m.radius) for _, m, _ in parts),
        "\n".join(_number(m.scale) for _, m, _ in parts),
        "\n".join(modes for *_, modes in parts),
    ]
    if plan.is_sharded:
        found.append(ranges(row.owners) if row.owners else "cut over all")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def cut_rows(plan: Plan) -> list[list[str]]:
    """Return how tensor-parallel matrices are worked on, and what the other modes would cost."""
    alike: dict[Any, list[CutKind]] = {}
    for cut in plan.cuts:
        key = (cut.kinds, cut.shape, cut.dim, cut.tp_size, cut.count, cut.mode)
        alike.setdefault(key, []).append(cut)
    return [
        [
            ranges(c.stage for c in same),
            ", ".join(same[0].kinds),
            size(same[0].shape),
            f"{'columns' if same[0].dim else 'rows'} by {same[0].tp_size}",
            str(same[0].count),
            same[0].mode,
            same[0].why,
            ", ".join(f"{mode} {unit(cost)}" for mode, cost in same[0].costs.items()) or "-",
        ]
        for same in alike.values()
    ]


def show(plan: Plan, console: Console, speed: Speed | None, *, is_full: bool) -> None:
    """Print the plan.

    Args:
        plan: plan to print.
        console: console to print it on.
        speed: speeds for the share of the time; None if not stated.
        is_full: whether each parameter has a row of its own.
    """
    rows = [cells(plan, row) for row in rows_of(plan.parameters, is_full)]
    console.print(_table(f"--optimizer {plan.optimizer}", heads(plan), rows, console.is_terminal))
    if plan.cuts:
        title = "Cut by tensor parallelism"
        console.print(_table(title, CUT_COLUMNS, cut_rows(plan), console.is_terminal))
    lines = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in summary(plan, speed):
        lines.add_row(name, text)
    console.print(lines)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    for warning in plan.warnings:
        console.print(f"[bold]warning:[/bold] {escape(warning)}", highlight=False)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], is_terminal: bool) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD if is_terminal else None, title_justify="left")
    for head in columns:
        table.add_column(head, overflow="fold", justify="right" if head == "number" else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
