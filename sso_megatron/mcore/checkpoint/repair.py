"""Repairs a folder of checkpoints before Megatron looks at it, with the same outcome on all ranks."""

import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sso_megatron.mcore.checkpoint import folders
from sso_megatron.mcore.errors.collective_exit import check_together

_PATIENCE_SECONDS = 30.0
"""How long a rank waits for the first rank to repair a folder, where no process group exists yet."""


FORMATS = ("torch", "torch_dist")
"""Values of ``--ckpt-format`` whose checkpoints ``folders`` recognises."""


def prepare(load_dir: Path, args: Any) -> None:
    """Repair every folder that a load may look at, and refuse a ``--ckpt-step`` that cannot be loaded.

    Collectives: those of ``mend`` for each folder, and one gather of objects over the world.

    Args:
        load_dir: the folder to load from.
        args: Megatron's arguments, perhaps not validated yet.
    """
    for root in roots(load_dir, args):
        mend(root)
    check_together(lambda: _wrong_step(load_dir, args))


def roots(load_dir: Path, args: Any) -> list[Path]:
    """Return the folders that a load may look at: ``load_dir``, then that of non-persistent checkpoints."""
    if args.non_persistent_ckpt_type != "global":
        return [load_dir]
    return [load_dir, Path(args.non_persistent_global_ckpt_dir or load_dir / "non_persistent")]


def mend(root: Path) -> None:
    """Have the first rank repair a folder of checkpoints, and print one line if there was damage.

    All ranks end if the folder cannot be repaired.

    Collectives: a broadcast and a gather of objects over the world. Without a process group, as when
    arguments are read from a checkpoint, the other ranks watch the folder instead.
    """
    outcome: list[str | None] = [None]
    if not dist.is_initialized():
        is_first = os.environ.get("RANK", "0") == "0"
        outcome[0] = _mend_here(root) if is_first else _wait_until_mended(root)
    else:
        if dist.get_rank() == 0:
            outcome[0] = _mend_here(root)
        dist.broadcast_object_list(outcome, src=0)
    check_together(lambda: outcome[0])


def _mend_here(root: Path) -> str | None:
    """Repair a folder in this process; return what is wrong and cannot be repaired, or None."""
    try:
        damage = folders.find_leftovers(root)
        if damage is not None:
            folders.mend(root, damage)
            print(f"sso_megatron: {damage.line}", flush=True)
    except folders.FolderError as error:
        return str(error)
    except OSError as error:
        return f"{root} is left by a run that ended half-way, and cannot be mended: {error}"
    return None


def _wait_until_mended(root: Path) -> str | None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            if folders.find_leftovers(root) is None:
                return None
        except folders.FolderError as error:
            return str(error)
        except OSError:  # a folder is being renamed
            pass
        time.sleep(0.1)
    return f"{root} is left by a run that ended half-way, and the first rank has not mended it"


def _wrong_step(root: Path, args: Any) -> str | None:
    """Return what is wrong with ``--ckpt-step``, or None; another iteration is never loaded instead."""
    if not args.ckpt_step:
        return None
    for other in roots(root, args)[1:]:  # Megatron loads the newest of these unless it is older
        newest = max(folders.complete_iterations(other), default=-1)
        if newest >= args.ckpt_step:
            return (
                f"--ckpt-step {args.ckpt_step}: Megatron would take the non-persistent checkpoint of "
                f"iteration {newest} instead; leave out --non-persistent-ckpt-type"
            )
    folder = folders.iteration_folder(root, args.ckpt_step)
    if folders.is_usable(folder):
        return None
    there = ", ".join(map(str, folders.complete_iterations(root))) or "none"
    state = "is not complete" if folder.exists() else "is not there"
    return f"--ckpt-step {args.ckpt_step}: {folder} {state}; complete checkpoints: {there}"
