"""Spares installations from a wheel the compilation of data set helpers that the wheel contains."""

from sso_megatron.mcore.compat import private_api


def skip_helper_compilation() -> None:
    """Keep ``initialize_megatron`` from compiling the data set helpers that a wheel contains.

    Megatron runs ``make`` in its installed folder, which has no Makefile, and exits when that fails.
    Where the compiled helpers are missing (a source checkout), nothing is changed. It imports Megatron.
    """
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return  # make has to run, and prints its own error
    private_api.replace("megatron.core.datasets.utils:compile_helpers", _helpers_are_compiled)


def _helpers_are_compiled() -> None:
    """Do nothing, in the place of ``compile_helpers``."""
