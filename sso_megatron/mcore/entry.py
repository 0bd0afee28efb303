"""One call that makes Megatron know this package, before Megatron is imported."""

import os
import socket

from sso_megatron.mcore import arguments, checkpoint_loading, checkpoint_saving, compat, cpu, recorder


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
        checkpoint_saving.install()
        checkpoint_loading.install()
    except compat.UnsupportedError as error:
        arguments.fail(error)


def _hides_gpus() -> bool:
    """Whether the user asked for a rehearsal; a node that has lost its GPU has not."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""
