"""One call that makes Megatron know this package, before Megatron is imported."""

from sso_megatron.mcore import arguments, compat, cpu, recorder


def enter() -> None:
    """Check versions, rehearse on the CPU if there is no CUDA device, and hook into Megatron.

    Run it first in a training process: our flags and the names ``sso`` and ``muon_sphere`` then
    work in any script that uses Megatron's own argument parser. An error ends the process with one
    line and exit code 2. No process group is made.
    """
    try:
        compat.check_versions()
    except compat.UnsupportedError as error:
        arguments.fail(error)
    if cpu.cuda_is_missing():
        cpu.start_rehearsal()
    cpu.skip_helper_compilation()
    arguments.install()
    recorder.install()
