"""Ends a process of a run, or all of them together, after an error: one line, exit code 2."""

import os
import sys
from typing import NoReturn


class UnsupportedError(ValueError):
    """Raised when something that is installed or asked for cannot work; the message says the way out."""


def fail(error: object) -> NoReturn:
    """End the process with exit code 2, after one line on standard error by each node's first rank."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"sso_megatron: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
