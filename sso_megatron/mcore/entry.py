"""Functions that hook this package into Megatron, before its import or from a patched Megatron itself."""

import argparse
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sso_megatron.mcore.checkpoint import load_hooks, save_hooks
from sso_megatron.mcore.compat import compiled_helpers, private_api, versions
from sso_megatron.mcore.errors import UnsupportedError, fail
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.flags.parser import add_arguments, configs_from
from sso_megatron.mcore.flags.validation import (
    check_criterion,
    check_loading,
    check_metrics,
    check_request,
    refuse_idle_flags,
    unread_flags,
)
from sso_megatron.mcore.metrics import loop_hooks
from sso_megatron.mcore.optimizer import model_hooks, registration
from sso_megatron.mcore.rehearsal import rehearsal
from sso_megatron.runs.writer import prepare_folder


def enter() -> None:
    """Check versions, rehearse on the CPU if there is no CUDA device, and hook into Megatron.

    Run it first in a training process: our flags and the names for ``--optimizer`` then
    work in any script that uses Megatron's own argument parser. An error ends the process with one
    line and exit code 2. No process group is made.
    """
    try:
        versions.check_versions()
        if rehearsal.cuda_is_missing():
            if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE") and not _hides_gpus():
                fail(
                    f"no CUDA device on {socket.gethostname()}, one node of several; mend it, or rehearse "
                    "on the CPU with CUDA_VISIBLE_DEVICES= (empty) on every node"
                )
            rehearsal.start_rehearsal()
        compiled_helpers.skip_helper_compilation()
        _hook_arguments()
        loop_hooks.install()
        _hook_checkpoints()
    except UnsupportedError as error:
        fail(error)


def plug_in(registry: dict[str, Any]) -> None:
    """Hook into a Megatron that is being imported; one with the patches of ``patches/`` calls this itself.

    Megatron finds it by our entry point. The call comes too late for a rehearsal on the CPU, and in every
    process that imports Megatron's training loop. So it changes nothing for other optimizers: names and
    flags are added, and checkpoints are hooked only where the command line asks for one of ours. A
    Megatron-Core that cannot work with this package is reported in a warning and left as it is.

    Args:
        registry: Megatron's table of emerging optimizers, where ``register`` puts ours.
    """
    try:
        if not registration.is_registered():
            registration.register()
        _hook_arguments(for_ours=_hook_checkpoints)
        loop_hooks.install()
    except UnsupportedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"sso_megatron: warning: not plugged in: {error}", file=sys.stderr, flush=True)


def _hook_arguments(for_ours: Callable[[], None] = lambda: None) -> None:
    """Hook flags and checks into Megatron's argument module.

    Args:
        for_ours: called as well where the command line asks for one of our optimizers.
    """

    def with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda parser: add_arguments(original(parser))

    def with_checks(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate_args(args: argparse.Namespace, *rest: Any, **named: Any) -> Any:
            try:
                check_and_register(args)
            except (ValueError, ImportError) as error:
                fail(error)
            if args.optimizer in OPTIMIZERS:
                for_ours()
            return original(args, *rest, **named)

        return validate_args

    private_api.wrap("megatron.training.arguments:add_megatron_arguments", with_flags)
    private_api.wrap("megatron.training.arguments:validate_args", with_checks)


def check_and_register(args: argparse.Namespace) -> None:
    """Check parsed arguments before Megatron validates them, and register the optimizer they ask for.

    In a rehearsal it also chooses what a CPU can run, and with ``--spectral-run-dir`` it prepares the
    folder of the run.

    Raises:
        ValueError: a check failed; see ``configs_from``, ``flags.validation`` and
            ``rehearsal.adapt_arguments``.
    """
    refuse_idle_flags(args)
    check_criterion(args)
    check_metrics(args)
    check_loading(args)
    if args.optimizer in OPTIMIZERS:
        check_request(args)
        note = unread_flags(args)
        if note and args.rank == 0:
            print(f"sso_megatron: {note}", flush=True)
        if rehearsal.cuda_is_missing() and not rehearsal.rehearses():
            raise ValueError(
                f"--optimizer {args.optimizer}: no CUDA device found, and Megatron was imported before it "
                "could be sent to the CPU; to rehearse, start the script with python -m sso_megatron.run"
            )
        registration.register(*configs_from(args))
        model_hooks.install()
    if rehearsal.rehearses():
        rehearsal.adapt_arguments(args)
    if args.spectral_run_dir is not None:  # on every rank: all of them stop before a process group exists
        prepare_folder(Path(args.spectral_run_dir), goes_on=args.load is not None)


def _hook_checkpoints() -> None:
    save_hooks.install()
    load_hooks.install()


def _hides_gpus() -> bool:
    """Return whether the user has hidden the GPUs to rehearse, unlike on a node that has lost its GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""
