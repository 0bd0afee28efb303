"""The console command ``sso-megatron``: one subcommand a module."""

import argparse
from collections.abc import Sequence

from sso_megatron.cli import criterion, export, patch
from sso_megatron.cli.bench import command as bench
from sso_megatron.cli.data import command as data
from sso_megatron.cli.experiments import command as render
from sso_megatron.cli.plan import command as plan
from sso_megatron.cli.plot import command as plot
from sso_megatron.cli.train import first_run
from sso_megatron.cli.watch import command as watch
from sso_megatron.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="sso-megatron", description="Spectral optimizers for Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=f"sso-megatron {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    first_run.add_parser(subparsers)
    data.add_parser(subparsers)
    export.add_parser(subparsers)
    bench.add_parser(subparsers)
    criterion.add_parser(subparsers)
    plot.add_parser(subparsers)
    watch.add_parser(subparsers)
    plan.add_parser(subparsers)
    render.add_parser(subparsers)
    patch.add_parser(subparsers)
    options, others = parser.parse_known_args(argv)
    if others and not getattr(options, "takes_megatron_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.megatron_flags = others
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
