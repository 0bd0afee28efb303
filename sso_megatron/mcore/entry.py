"""Calls that make Megatron know this package: before it is imported, or from a patched one itself."""

import os
import socket
import sys
from typing import Any

from sso_megatron.mcore import (
    arguments,
    checkpoint_loading,
    checkpoint_saving,
    compat,
    cpu,
    recorder,
    registration,
)


def enter() -> None:
    """Check versions, rehearse on the CPU if there is no CUDA device, and hook into Megatron.

    Run it first in a training process: our flags and the names for ``--optimizer`` then
    work in any script that uses Megatron's own argument parser. An error ends the process with one
    line and exit code 2. No process group is made.
    """
    try:
        compat.check_versions()
        if cpu.cuda_is_missing():
            if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE") and not _hides_gpus():
                arguments.fail(
                    f"no CUDA device on {socket.gethostname()}, one node of several; mend it, or rehearse "
                    "on the CPU with CUDA_VISIBLE_DEVICES= (empty) on every node"
                )
            cpu.start_rehearsal()
        cpu.skip_helper_compilation()
        arguments.install()
        recorder.install()
        _hook_checkpoints()
    except compat.UnsupportedError as error:
        arguments.fail(error)


def plug_in(registry: dict[str, Any]) -> None:
    """What a Megatron with the patches of ``patches/`` calls at its import, by our entry point.

    It comes too late for a rehearsal on the CPU, and in every process that imports Megatron's training
    loop. So it changes nothing for other optimizers: names and flags are added, checkpoints are hooked
    only where the command line asks for one of ours. A Megatron-Core that we do not know is told, and
    left alone.

    Args:
        registry: Megatron's table of emerging optimizers, where ``register`` puts ours.
    """
    try:
        if not registration.is_registered():
            registration.register()
        arguments.install(for_ours=_hook_checkpoints)
        recorder.install()
    except compat.UnsupportedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"sso_megatron: warning: not plugged in: {error}", file=sys.stderr, flush=True)


def _hook_checkpoints() -> None:
    checkpoint_saving.install()
    checkpoint_loading.install()


def _hides_gpus() -> bool:
    """Whether the user asked for a rehearsal; a node that has lost its GPU has not."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""
