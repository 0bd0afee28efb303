"""Runs the console command ``sso-megatron``, which imports a subcommand when it is called and not before.

So ``--version`` and ``--help`` need neither torch nor Megatron.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from sso_megatron.cli.shared.errors import discard_output, report_error
from sso_megatron.version import __version__

COMMANDS = {
    "first-run": ("train.first_run", "train a small GPT on this machine"),
    "data": ("data.command", "turn text files into indexed datasets that Megatron trains on"),
    "export": ("export", "write a checkpoint's weights exactly on their spheres"),
    "bench": ("bench.command", "measure optimizer steps beside AdamW and Megatron's Muon"),
    "criterion": ("criterion", "which modules a spectral update should help"),
    "plot": ("plot.command", "pictures of runs, and a report"),
    "watch": ("watch.command", "how a run is doing: progress, loss, health"),
    "plan": ("plan.command", "what the optimizer will do to every weight of a run, before it"),
    "render": ("experiments.command", "the flags of an experiment of configs/, for a command line"),
    "patch": ("patch", "show, apply or revert the patches for a Megatron-LM checkout"),
}
"""Maps a name to the module in ``cli``, which has ``add_arguments`` and ``run``, and to a line of help."""


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``sso-megatron``, with the arguments of one subcommand.

    Args:
        command: the subcommand whose module is imported; None to import none.
    """
    parser = argparse.ArgumentParser(
        prog="sso-megatron", description="Spectral optimizers for Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=f"sso-megatron {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text)
        if name == command:
            implementation = importlib.import_module(f"sso_megatron.cli.{module}")
            implementation.add_arguments(subparser)
            subparser.set_defaults(run=implementation.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code, which is 2 after an error was printed in one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), "")
    parser = make_parser(command)
    options, others = parser.parse_known_args(words)
    if others and not getattr(options, "takes_megatron_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.megatron_flags = others
    try:
        return int(options.run(options))
    except BrokenPipeError:  # a reader that has seen enough, such as head; rich ends in this way, too
        discard_output()
        return 1
    except (ValueError, OSError) as error:
        return report_error(command, error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
