"""Ends a command after an error, with one line on standard error and exit code 2."""

import os
import sys


def report_error(command: str, error: object) -> int:
    """Print an error as one line and return the exit code 2.

    Args:
        command: name of the subcommand.
        error: an exception, or its text.
    """
    print(f"sso-megatron {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def discard_output() -> None:
    """Send standard output to nowhere: Python would report a broken pipe again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
