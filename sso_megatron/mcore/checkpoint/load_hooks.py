"""Hooks into Megatron's loading: they repair folders, find damaged checkpoints, and end all ranks together.

They serve every optimizer. They leave folders in object stores (``--enable-msc``) as they are.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sso_megatron.mcore.checkpoint import compatibility, folders, manifest, pickles, repair, stacked_keys
from sso_megatron.mcore.checkpoint.explanation import describe
from sso_megatron.mcore.compat import private_api, tensor_metadata
from sso_megatron.mcore.errors.collective_exit import (
    ERRORS,
    CheckpointError,
    cause_of,
    check_together,
    exit_together,
)


@dataclass
class _Loading:
    """Holds what the hooks know about the load in progress.

    Attributes:
        optimizer: optimizer that gets the state; None also while only arguments are read.
        verified: checkpoints whose files have been hashed.
        saved: the arguments that each checkpoint was saved with.
        roots: folders in which checkpoints are looked for; after the first, those of non-persistent ones.
        masters: float32 copies that the checkpoint lacks, each with its weight.
    """

    optimizer: Any = None
    verified: set[Path] = field(default_factory=set)
    saved: dict[Path, Any] = field(default_factory=dict)
    roots: list[Path] = field(default_factory=list)
    masters: list[tuple[Tensor, Tensor]] = field(default_factory=list)


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
    # The training loop has imported the function under a name of its own.
    load_checkpoint = private_api.existing("megatron.training.checkpointing:load_checkpoint")
    private_api.replace("megatron.training.training:load_checkpoint", load_checkpoint)
    verify = "megatron.core.dist_checkpointing.serialization:verify_integrity_manifest"
    private_api.wrap(verify, _unless_verified)
    tensor_metadata.install()


def _all_or_none(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as Megatron does, and end all ranks if one of them fails.

        Collectives: Megatron's, those of the hooks below, and a barrier at the end.
        """
        _loading.optimizer = optimizer
        try:
            with exit_together(describe), _masters_first(optimizer):
                return original(ddp_model, optimizer, *args, **kwargs)
        finally:
            _loading.optimizer = None
            _loading.masters = []

    return load_checkpoint


@contextlib.contextmanager
def _masters_first(optimizer: Any) -> Iterator[None]:
    """Run a block in which float32 copies that a checkpoint lacks are made of the loaded weights.

    Megatron loads the weights before it gives the optimizer its state.
    """
    if optimizer is None:
        yield
        return
    original = optimizer.load_state_dict

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        for master, weight in _loading.masters:
            master.copy_(weight)
        return original(*args, **kwargs)

    optimizer.load_state_dict = load_state_dict
    try:
        yield
    finally:
        del optimizer.load_state_dict


# ---------------------------------------------------------------- before the first look


def _once_mended(original: Callable[..., Any]) -> Callable[..., Any]:
    """Repair the folder first: a lost tracker would send Megatron to ``--pretrained-checkpoint``."""

    def checkpoint_exists(checkpoints_path: Any) -> Any:
        from megatron.training import get_args

        is_known = get_args().ckpt_format in repair.FORMATS and not folders.uses_object_store()
        if checkpoints_path is not None and is_known:
            repair.mend(Path(checkpoints_path))
        return original(checkpoints_path)

    return checkpoint_exists


def _from_mended_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_base_checkpoint(
        load_dir: Any, args: Any, rank0: bool = False, *rest: Any, **kwargs: Any
    ) -> Any:
        """Load as Megatron does, from folders that have been repaired.

        Collectives: Megatron's and those of ``repair.prepare``.

        Raises:
            CheckpointError: the checkpoint has no optimizer state, and some is to be loaded.
        """
        result = load_repaired(load_dir, args, rank0, *rest, **kwargs)
        if not rank0 and result[0] and _wants_optimizer(args) and "optimizer" not in result[0]:
            raise CheckpointError(
                f"the checkpoint in {load_dir} has no optimizer state, as --no-save-optim leaves it: add "
                "--no-load-optim to keep iteration and weights and start the optimizer and its learning "
                "rate schedule anew"
            )
        return result

    def load_repaired(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        if load_dir is None or folders.uses_object_store():
            return original(load_dir, args, *rest, **kwargs)
        _loading.roots = repair.roots(Path(load_dir), args)
        if args.ckpt_format in repair.FORMATS:
            repair.prepare(Path(load_dir), args)
        return _unless_it_exits(lambda: original(load_dir, args, *rest, **kwargs), Path(load_dir), args)

    return load_base_checkpoint


def _wants_optimizer(args: Any) -> bool:
    return _loading.optimizer is not None and not (args.no_load_optim or args.finetune)


def _unless_it_exits(load: Callable[[], Any], root: Path, args: Any) -> Any:
    """Call ``load``, and raise where Megatron exits with code 0 because of a file that it cannot read.

    Megatron does so with ``--ckpt-format torch``, on one rank. Its exit with code 0 on all ranks, which
    ``--exit-on-missing-checkpoint`` asks for, is passed on.

    Raises:
        CheckpointError: Megatron cannot read a file of the checkpoint.
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
        """Check that the checkpoint is undamaged and fits the run, and load it as Megatron does.

        Collectives: Megatron's, and a gather of objects over the world for each check.
        """

        def load() -> Any:
            return original(load_dir, args, rank0, sharded_state_dict, iteration, release, *rest, **kwargs)

        if folders.uses_object_store():
            return load()
        folder = folders.iteration_folder(Path(load_dir), iteration)
        if release:
            folder = Path(load_dir) / "release"
        if not rank0:
            _check_contents(folder, sharded_state_dict, args)
            result = load()
            stacked_keys.discard_unused(result[0])
            return result
        _check_files(folder)
        with _naming_the_file(folder):
            result = load()
        _loading.saved[folder] = saved = result[0].get("args")
        check_together(
            lambda: compatibility.wrong_optimizer(folder, saved, args) if _wants_optimizer(args) else None
        )
        return result

    return load_global_dist_base_checkpoint


def _if_its_files_are_sound(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check files first: without ``metadata.json`` Megatron would take the format for another one."""

    def get_checkpoint_format(checkpoint_name: Any, args: Any) -> Any:
        """Return the format of a checkpoint as Megatron does, after a check of its files.

        Collectives: those of ``_check_files``.
        """
        if not folders.uses_object_store():
            _check_files(Path(checkpoint_name))
        return original(checkpoint_name, args)

    return get_checkpoint_format


def _check_files(folder: Path) -> None:
    """Compare files with the manifest and pickles with the list; end all ranks if one of them is wrong.

    A checkpoint is looked at once in a run.

    The ranks share the work. While arguments are read from a checkpoint there is no process group, and each
    rank would have to read all files: then only ``.metadata`` is compared, and the others must exist.

    Collectives: one gather of objects over the world.
    """
    if folder in _loading.verified:
        return
    together = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def check() -> str | None:
        damage = manifest.find_damaged_file(folder, rank, size, reads=together)
        damage = damage or pickles.find_foreign(folder, rank, size, reads=together)
        return damage and f"{damage}; {_way_out(folder)}"

    check_together(check)
    if together and (folder / folders.MANIFEST).exists():
        _loading.verified.add(folder)


def _way_out(folder: Path) -> str:
    """Return what a user can do about a damaged checkpoint, as the end of a message."""
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
    """Run a block that reads the common state, and name the damaged file where Megatron's error does not.

    It issues no collectives. Without a process group an error ends this rank.

    Raises:
        CheckpointError: the block raised, and there is a process group.
    """
    try:
        yield
    except ERRORS as error:  # torch raises anything on bytes that it cannot read
        # Verified files are not at fault, and every rank comes here: none should read all files again.
        damage = manifest.find_damaged_file(folder, reads=False)
        text = damage or f"{folder} cannot be read ({cause_of(error)})"
        problem = CheckpointError(f"{text}; {_way_out(folder)}")
    else:
        return
    if dist.is_initialized():
        raise problem
    check_together(lambda: str(problem))  # without a process group: ends this rank


def _check_contents(folder: Path, wanted: Any, args: Any) -> None:
    """Ask for what the checkpoint has, and end all ranks if something is missing or of another shape.

    Collectives: two gathers of objects over the world.
    """
    anew = stacked_keys.Anew()

    def check() -> str | None:
        nonlocal anew
        try:
            stored = compatibility.stored_contents(folder)
        except ERRORS as error:
            return f"{folder}/.metadata cannot be read ({cause_of(error)}); {_way_out(folder)}"
        compatibility.drop_missing_optional(wanted, stored)
        # A hash of the metadata tells a state that was never saved from one that has been lost.
        is_whole = (folder / folders.MANIFEST).exists()
        anew = stacked_keys.match_(wanted, stored, may_start_anew=is_whole)
        saved = _loading.saved.get(folder)
        return compatibility.wrong_contents(folder, wanted, stored, saved, args)

    check_together(check)
    stacked_keys.complete_(wanted, anew)
    _loading.masters = anew.masters


def _unless_verified(original: Callable[..., Any]) -> Callable[..., Any]:
    """Skip verified checkpoints: ``--verify-integrity`` would hash all files again, on one rank."""

    def verify_integrity_manifest(checkpoint_dir: Any) -> None:
        if Path(checkpoint_dir) not in _loading.verified:
            original(checkpoint_dir)

    return verify_integrity_manifest
