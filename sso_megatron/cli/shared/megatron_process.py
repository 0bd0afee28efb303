"""Runs Megatron in a command that trains nothing: without GPU and output, with errors in one line."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


def enter_without_gpu() -> None:
    """Hook into Megatron as a run of one rank would, with the GPUs of this machine hidden."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    from sso_megatron.mcore import entry

    entry.enter()


@contextlib.contextmanager
def without_noise() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Hide from the user what Megatron prints; yield what went to standard output and standard error."""
    printed, said = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        was_disabled = logging.root.manager.disable
        logging.disable()
        try:
            yield printed, said
        finally:
            logging.disable(was_disabled)


def reason(output: str) -> str:
    """Return why a process of Megatron's ended, from its output.

    This is the text after the last ``error: ``; all of the output if there is none.
    """
    told = [line for line in output.splitlines() if "error: " in line]
    return told[-1].split("error: ", 1)[1] if told else output.strip() or "no reason given"
