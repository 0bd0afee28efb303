"""Hooks where Megatron loads: folders are mended first, damage is found, and all ranks end together.

They serve every optimizer. Folders in object stores (``--enable-msc``) are left alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sso_megatron.mcore.checkpoint import compatibility, folders, manifest, repair
from sso_megatron.mcore.checkpoint.collective_exit import (
    ERRORS,
    CheckpointError,
    cause_of,
    check_together,
    exit_together,
)
from sso_megatron.mcore.checkpoint.save_hooks import uses_object_store
from sso_megatron.mcore.compat import private_api


@dataclass
class _Loading:
    """What the load that is under way has found.

    Attributes:
        optimizer: that gets the state; None also while only arguments are read.
        verified: checkpoints whose files have been hashed.
        saved: the arguments that checkpoints were saved with.
        roots: where checkpoints are looked for; after the first, non-persistent ones.
    """

    optimizer: Any = None
    verified: set[Path] = field(default_factory=set)
    saved: dict[Path, Any] = field(default_factory=dict)
    roots: list[Path] = field(default_factory=list)


_loading = _Loading()


def install() -> None:
    """Hook into Megatron's loading.

    Raises:
        UnsupportedError: this Megatron-Core lacks one of the functions.
    """
    for name, wrapper in (
        ("load_checkpoint", _all_or_none),
        ("checkpoint_exists", _once_mended),
        ("_load_base_checkpoint", _from_mended_folder),
        ("_get_checkpoint_format", _if_its_files_are_sound),
        ("_load_global_dist_base_checkpoint", _if_it_fits),
    ):
        private_api.wrap(f"megatron.training.checkpointing:{name}", wrapper)
    # The training loop has a name of its own for it.
    load_checkpoint = private_api.existing("megatron.training.checkpointing:load_checkpoint")
    private_api.replace("megatron.training.training:load_checkpoint", load_checkpoint)
    verify = "megatron.core.dist_checkpointing.serialization:verify_integrity_manifest"
    private_api.wrap(verify, _unless_verified)


def _all_or_none(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Collectives, beside Megatron's and those of the hooks below: a barrier at the end."""
        _loading.optimizer = optimizer
        try:
            with exit_together(_describe):
                return original(ddp_model, optimizer, *args, **kwargs)
        finally:
            _loading.optimizer = None

    return load_checkpoint


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return f"the checkpoint cannot be loaded: {cause_of(error)}"


# ---------------------------------------------------------------- before the first look


def _once_mended(original: Callable[..., Any]) -> Callable[..., Any]:
    """Else a lost tracker would send Megatron to ``--pretrained-checkpoint``."""

    def checkpoint_exists(checkpoints_path: Any) -> Any:
        from megatron.training import get_args

        is_known = get_args().ckpt_format in repair.FORMATS and not uses_object_store()
        if checkpoints_path is not None and is_known:
            repair.mend(Path(checkpoints_path))
        return original(checkpoints_path)

    return checkpoint_exists


def _from_mended_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """Collectives, beside Megatron's: those of ``repair.prepare``."""
        if load_dir is None or uses_object_store():
            return original(load_dir, args, *rest, **kwargs)
        _loading.roots = repair.roots(Path(load_dir), args)
        if args.ckpt_format in repair.FORMATS:
            repair.prepare(Path(load_dir), args)
        return _unless_it_exits(lambda: original(load_dir, args, *rest, **kwargs), Path(load_dir), args)

    return load_base_checkpoint


def _unless_it_exits(load: Callable[[], Any], root: Path, args: Any) -> Any:
    """Megatron ends with exit code 0 on one rank when it cannot read a file of ``--ckpt-format torch``.

    With ``--exit-on-missing-checkpoint`` it ends so on all ranks, as it was asked to.
    """
    from megatron.training import checkpointing

    try:
        return load()
    except SystemExit as stop:
        iteration = checkpointing.get_loaded_iteration()
        if stop.code or iteration in (None, -1):
            raise
    folder = folders.iteration_folder(root, iteration)
    raise CheckpointError(
        f"a file of {folder} cannot be read (Megatron's message is in the log); {_way_out(folder)}"
    )


# ---------------------------------------------------------------- the checkpoint itself


def _if_it_fits(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_global_dist_base_checkpoint(
        load_dir: Any,
        args: Any,
        rank0: bool,
        sharded_state_dict: Any,
        iteration: int,
        release: bool,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """Collectives, beside Megatron's: a gather of objects over the world for each check."""

        def load() -> Any:
            return original(load_dir, args, rank0, sharded_state_dict, iteration, release, *rest, **kwargs)

        if uses_object_store():
            return load()
        folder = folders.iteration_folder(Path(load_dir), iteration)
        if release:
            folder = Path(load_dir) / "release"
        if not rank0:
            _check_contents(folder, sharded_state_dict, args)
            return load()
        _check_files(folder)
        with _naming_the_file(folder):
            result = load()
        _loading.saved[folder] = saved = result[0].get("args")
        wants_optimizer = _loading.optimizer is not None and not (args.no_load_optim or args.finetune)
        check_together(
            lambda: compatibility.wrong_optimizer(folder, saved, args) if wants_optimizer else None
        )
        return result

    return load_global_dist_base_checkpoint


def _if_its_files_are_sound(original: Callable[..., Any]) -> Callable[..., Any]:
    """Else a checkpoint that has lost ``metadata.json`` would be taken for one in another format."""

    def get_checkpoint_format(checkpoint_name: Any, args: Any) -> Any:
        """Collectives: those of ``_check_files``."""
        if not uses_object_store():
            _check_files(Path(checkpoint_name))
        return original(checkpoint_name, args)

    return get_checkpoint_format


def _check_files(folder: Path) -> None:
    """Compare every file with the manifest, once in a run; all ranks share the work.

    Where arguments are read from a checkpoint there is no process group, and each rank would have to read
    all: there only ``.metadata`` is read, and it is seen to that no other file is missing.

    Collectives: one gather of objects over the world.
    """
    if folder in _loading.verified:
        return
    together = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def check() -> str | None:
        damage = manifest.find_damage(folder, rank, size, reads=together)
        return damage and f"{damage}; {_way_out(folder)}"

    check_together(check)
    if together and (folder / folders.MANIFEST).exists():
        _loading.verified.add(folder)


def _way_out(folder: Path) -> str:
    """What helps against a damaged checkpoint."""
    if folder.parent in _loading.roots[1:]:  # Megatron takes a non-persistent one if it is the newest
        return "remove it to load the last persistent checkpoint"
    iteration = int(folder.name.removeprefix("iter_")) if folder.name != "release" else 0
    others = folders.complete_iterations(folder.parent, folders.is_usable)
    others = [i for i in others if i != iteration]
    if not others:
        return "no other checkpoint is there: restore the file, or give another --load"
    older = [i for i in others if i < iteration]
    return f"restore it, or load another checkpoint with --ckpt-step {max(older or others)}"


@contextlib.contextmanager
def _naming_the_file(folder: Path) -> Iterator[None]:
    """What Megatron raises while it reads the common state does not say which file is at fault."""
    try:
        yield
    except ERRORS as error:  # torch raises anything on bytes that it cannot read
        # What was verified is not at fault, and every rank is here: none of them reads it all again.
        damage = manifest.find_damage(folder, reads=False)
        text = damage or f"{folder} cannot be read ({cause_of(error)})"
        problem = CheckpointError(f"{text}; {_way_out(folder)}")
    else:
        return
    if dist.is_initialized():
        raise problem
    check_together(lambda: str(problem))  # without a process group: ends this rank


def _check_contents(folder: Path, wanted: Any, args: Any) -> None:
    """Drop what is optional and missing, and refuse what is missing or of another shape.

    Collectives: one gather of objects over the world.
    """

    def check() -> str | None:
        try:
            stored = compatibility.stored_contents(folder)
        except ERRORS as error:
            return f"{folder}/.metadata cannot be read ({cause_of(error)}); {_way_out(folder)}"
        compatibility.drop_missing_optional(wanted, stored)
        saved = _loading.saved.get(folder)
        return compatibility.wrong_contents(folder, wanted, stored, saved, args)

    check_together(check)


def _unless_verified(original: Callable[..., Any]) -> Callable[..., Any]:
    """``--verify-integrity`` would hash all files again, on one rank."""

    def verify_integrity_manifest(checkpoint_dir: Any) -> None:
        if Path(checkpoint_dir) not in _loading.verified:
            original(checkpoint_dir)

    return verify_integrity_manifest
