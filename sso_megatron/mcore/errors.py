"""How a process of a run ends on an error: one line, exit code 2."""

import os
import sys
from typing import NoReturn


class UnsupportedError(ValueError):
    """Something that is installed or asked for cannot work; the message says the way out."""


def fail(error: object) -> NoReturn:
    """One line on the standard error of each node's first rank, exit code 2 on every rank."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"sso_megatron: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
