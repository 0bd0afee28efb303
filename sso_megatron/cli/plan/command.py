"""``sso-megatron plan`` shows what the optimizer will do to every weight of a run, before the run."""

import argparse
import json
import os
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from sso_megatron.cli.plan import html as plan_html
from sso_megatron.cli.plan import text as plan_text
from sso_megatron.cli.plan.speed import Speed
from sso_megatron.cli.shared import megatron_process
from sso_megatron.cli.train import pretrain_gpt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron plan``."""
    parser.description = (
        "What the optimizer will do to every weight of a run, before it: routes, logical matrices, radii, "
        "who works on what, flops, bytes, memory, and warnings. Give the flags of python -m "
        "sso_megatron.pretrain_gpt. One process, no GPU, no weights."
    )
    parser.usage = "%(prog)s [options of its own] MEGATRON_FLAGS..."
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--world-size", type=int, metavar="N", help="ranks of the run (default: the fewest that the layout "
        "can have)")  # fmt: skip
    add("--full", action="store_true", help="a row for each parameter; else equal layers share one")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE")
    add("--html", type=Path, metavar="FILE", help="write a page that needs no network")
    add("--flops", type=float, nargs="+", metavar="F", help="FLOP/s of a GPU in the model's products, and "
        "in the optimizer's float32 ones if these differ: tells its share of an iteration")  # fmt: skip
    add("--bandwidth", type=float, metavar="B", help="with --flops, bytes a second that a rank receives "
        "from its tensor-parallel group")  # fmt: skip
    parser.set_defaults(takes_megatron_flags=True)


def run(options: argparse.Namespace) -> int:
    """Run the ``plan`` command."""
    try:
        speed = Speed.of(options.flops, options.bandwidth)
        if options.world_size is not None and options.world_size < 1:
            raise ValueError(f"--world-size {options.world_size} must be at least 1")
        _check_files(options)
        with megatron_process.without_noise() as (printed, said):
            plan = _make(options)
        share = speed and speed.share(plan)
        for path in _files(options):
            path.parent.mkdir(parents=True, exist_ok=True)
        if options.json:
            options.json.write_text(json.dumps(plan.as_json() | {"share": share}) + "\n")
        if options.html:
            options.html.write_text(plan_html.page(plan, speed))
    except (ValueError, AssertionError, RuntimeError, OSError, ImportError) as error:
        raise ValueError(megatron_process.reason(str(error) or _where(error))) from error
    except (ArithmeticError, TypeError, LookupError) as error:
        raise ValueError(f"{_where(error)}: {error}") from error
    except SystemExit as stop:
        # Where Megatron ends without a code, its reason is the last line on the standard output.
        output = said.getvalue() if stop.code else printed.getvalue().strip().rpartition("\n")[2]
        raise ValueError(megatron_process.reason(output)) from None
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    plan_text.show(plan, console, speed, is_full=options.full)
    return 0


def _make(options: argparse.Namespace) -> Any:
    megatron_process.enter_without_gpu()
    from sso_megatron.mcore.plan.advice import warnings_of
    from sso_megatron.mcore.plan.model import make_plan
    from sso_megatron.mcore.plan.request import read_flags

    request = read_flags(
        options.megatron_flags, options.world_size, pretrain_gpt.DEFAULTS, pretrain_gpt.refuse_packed_data
    )
    plan = make_plan(request, pretrain_gpt.embedding_ranks)
    plan.warnings = warnings_of(plan, request.args)
    return plan


def _check_files(options: argparse.Namespace) -> None:
    """Raise an error now, not after the work, if a file cannot be written; make no file."""
    paths = _files(options)
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"--json and --html both name {options.json}; give each a file of its own")
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file")
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
            raise OSError(f"{path} cannot be written: {there} stands in the way; name another file")


def _files(options: argparse.Namespace) -> list[Path]:
    return [path for path in (options.json, options.html) if path is not None]


def _where(error: Exception) -> str:
    """Return the type of an error that states no reason, and the line of code that it comes from."""
    return f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1].line}"
