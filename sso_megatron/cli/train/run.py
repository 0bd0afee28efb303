"""Runs an unmodified Megatron training script with this plugin: ``-m sso_megatron.run``.

    torchrun --nproc-per-node 2 -m sso_megatron.run /path/to/pretrain_gpt.py <flags>

The script sees the same ``sys.argv`` and ``sys.path[0]`` as if Python had run it directly.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

_USAGE = "usage: torchrun [options] -m sso_megatron.run SCRIPT.py [Megatron's flags and ours]"


def _script_error(arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the script argument, or None."""
    if not arguments or arguments[0].startswith("-"):
        found = f"found {arguments[0]!r}" if arguments else "found nothing"
        return f"the first argument must be a training script such as pretrain_gpt.py, {found}"
    script = arguments[0]
    if not os.path.isfile(script):
        return f"no such script: {script!r} (working directory: {os.getcwd()})"
    if not os.access(script, os.R_OK):
        return f"the script cannot be read: {script!r} (check its permissions)"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Enter Megatron and run the script as ``__main__``.

    Args:
        argv: The script and its flags; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, or 2 if there is no script to run. A script that calls ``sys.exit``
        or raises ends the process in its own way.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    error = _script_error(arguments)
    if error:
        print(f"sso_megatron.run: {error}\n{_USAGE}", file=sys.stderr)
        return 2

    from sso_megatron import mcore  # late: it imports torch and Megatron, and errors come first

    script = os.path.abspath(arguments[0])
    # Before Megatron is imported: a script in a checkout must find the checkout's Megatron.
    sys.path.insert(0, os.path.dirname(script))
    sys.argv = arguments
    mcore.enter()
    runpy.run_path(script, run_name="__main__")
    return 0
