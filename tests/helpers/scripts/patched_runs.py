"""Plain Megatron scripts on the CPU, from one import of a patched Megatron; no call of ours hooks it.

    python patched_runs.py '[[folder, script, flag, ...], ...]'

Each list is a run in a process of its own. Without a GPU, torch's CUDA functions are sent to the CPU first,
which tells Megatron nothing of the optimizers.
"""

import json
import os
import runpy
import sys

from helpers.zygote import read_help_texts_once
from sso_megatron.mcore.rehearsal.rehearsal import start_rehearsal


def run(folder: str, argv: list[str]) -> None:
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
    sys.stdout.flush()


if __name__ == "__main__":
    start_rehearsal()
    import megatron.training
    import megatron.training.argument_utils  # noqa: F401  what their_pretrain.py imports

    read_help_texts_once()
    for folder, *argv in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            try:
                run(folder, argv)
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        os.waitpid(child, 0)
