"""Names, completes and repairs folders of checkpoints, so that the last complete checkpoint is always kept.

A checkpoint ``iter_0000010`` is made in steps, and a run may be killed between any two:

1. ``partial-iter_0000010`` is filled; its manifest is written last;
2. where the iteration was saved before, the older checkpoint is renamed ``old-iter_0000010``;
3. the partial folder is renamed ``iter_0000010``;
4. the old folder is removed, and the tracker file is replaced.

So a folder named ``iter_*`` is complete, unless another program made it. After a run that ended half-way
``find_leftovers`` returns what has to be repaired, and ``mend`` repairs it. Both are for one process: they
issue no collectives, and use nothing of Megatron but the names of its files.

The names of partial and old folders do not begin with ``iter_``, because Megatron takes what follows that
prefix for a number when it looks for old checkpoints (``cleanup_old_non_persistent_checkpoint``).
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file with the iteration that a restart loads."""

MANIFEST = "integrity.json"
"""Megatron's file of hashes, which ``--verify-integrity`` reads."""

_METADATA = ("metadata.json", ".metadata")
_PARTIAL, _OLD = "partial-", "old-"


class FolderError(ValueError):
    """Reports a folder of checkpoints that cannot be used as it is; the message says the way out."""


def partial_of(folder: Path) -> Path:
    """Return the folder that the checkpoint ``folder`` is written into before it is complete."""
    return folder.with_name(_PARTIAL + folder.name)


def old_of(folder: Path) -> Path:
    """Return where an older checkpoint of the same iteration is kept until ``folder`` is complete."""
    return folder.with_name(_OLD + folder.name)


def iteration_folder(root: Path, iteration: int) -> Path:
    """Return the folder of an iteration's checkpoint, by Megatron's rule."""
    return root / f"iter_{iteration:07d}"


def is_checkpoint_name(name: str) -> bool:
    """Return whether Megatron gives this name to a checkpoint, rather than to a folder inside one."""
    return name == "release" or re.fullmatch(r"iter_\d{7,}", name) is not None


def is_complete(folder: Path) -> bool:
    """Return whether all of a torch_dist checkpoint was written.

    Later damage to its files is not looked for. The manifest is the last file that is written into a
    folder. Megatron without this package writes no manifest; its last file is ``metadata.json``.
    """
    return (folder / MANIFEST).is_file() or all((folder / name).is_file() for name in _METADATA)


def is_usable(folder: Path) -> bool:
    """Return whether a checkpoint is complete, as far as its format shows that.

    A checkpoint of ``--ckpt-format torch`` always counts: that format has no mark of completeness.
    """
    return is_complete(folder) or next(folder.glob("mp_rank_*"), None) is not None


def complete_iterations(root: Path, counts: Callable[[Path], bool] = is_complete) -> list[int]:
    """Return the iterations of all complete torch_dist checkpoints, oldest first.

    Args:
        root: the folder of checkpoints.
        counts: returns whether a checkpoint counts as complete.
    """
    found = [p for p in root.glob("iter_*") if is_checkpoint_name(p.name) and counts(p)]
    return sorted(int(p.name.removeprefix("iter_")) for p in found)


# ---------------------------------------------------------------- saving


def start_partial(folder: Path, sweep: bool) -> None:
    """Make the empty folder ``partial_of(folder)``, to write the checkpoint ``folder`` into.

    Args:
        folder: the checkpoint's final folder.
        sweep: also remove what earlier runs left of other checkpoints.
    """
    if sweep:
        _sweep(folder.parent)
    fresh = partial_of(folder)
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir(parents=True)
    if folder.is_dir() and not any(folder.iterdir()):  # Megatron makes it before it saves
        folder.rmdir()


def _sweep(root: Path) -> None:
    """Remove partial folders, and old folders whose successor is complete."""
    for left in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left)
    for left in root.glob(f"{_OLD}*"):
        if is_usable(root / left.name.removeprefix(_OLD)):
            _remove(left)


def publish(folder: Path) -> None:
    """Rename the partial folder of ``folder``, which is complete, to ``folder``.

    If there was a complete checkpoint of the iteration before, there is one at every moment.
    """
    old = old_of(folder)
    if is_usable(folder):
        if old.exists():  # an earlier run ended before it had removed the folder
            _remove(old)
        os.rename(folder, old)
    elif folder.exists():
        _remove(folder)
    os.rename(partial_of(folder), folder)
    sync_folder(folder.parent)
    if old.exists():
        _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or only the symbolic link to one that somebody has put elsewhere."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a file to write, which replaces ``path`` atomically when the block ends."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w") as file:
        yield file
        sync_file(file)
    os.replace(fresh, path)
    sync_folder(path.parent)


def sync_file(file: IO[str]) -> None:
    """Write out what the file's buffers hold, and return when it is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return when the names in ``folder`` are on the disk; a rename is not durable before that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- after a run that ended half-way


@dataclass(frozen=True)
class Damage:
    """Describes what ``mend`` has to repair.

    Attributes:
        taken_away: checkpoints that ``mend`` restores from their ``old_of``.
        iteration: iteration that the tracker has to name, or None if the tracker is right.
        found: the damage in words.
    """

    taken_away: tuple[Path, ...]
    iteration: int | None
    found: str

    @property
    def line(self) -> str:
        """The damage and its repair, in one line."""
        if self.iteration is None:
            return self.found
        return f"{self.found}; it now names iteration {self.iteration}, the newest complete checkpoint"


def find_leftovers(root: Path) -> Damage | None:
    """Return what a run that ended half-way left to repair in a folder of checkpoints, else None.

    It changes nothing, and looks for torch_dist checkpoints. A tracker that names a complete checkpoint is
    right, even where a newer one is there: somebody may have gone back on purpose.

    Raises:
        FolderError: the tracker names no usable checkpoint, and no complete checkpoint is there.
    """
    names = [p.name.removeprefix(_OLD) for p in root.glob(f"{_OLD}*") if is_usable(p)]
    taken_away = tuple(root / name for name in sorted(names) if not is_usable(root / name))
    found = [
        f"{p} was about to be replaced when a run ended; the old one is back in its place"
        for p in taken_away
    ]
    wrong = _wrong_tracker(root, taken_away)
    iteration = None
    if wrong is not None:
        back = [int(p.name.removeprefix("iter_")) for p in taken_away if p.name != "release"]
        complete = [*complete_iterations(root), *back]
        if complete:
            iteration = max(complete)
            found.append(f"{root / TRACKER} {wrong}")
        elif (root / TRACKER).exists():
            raise FolderError(
                f"{root / TRACKER} {wrong}, and no complete checkpoint is there; write the iteration to "
                "load into it, or remove it to start anew"
            )
    return Damage(taken_away, iteration, "; ".join(found)) if found else None


def _wrong_tracker(root: Path, taken_away: tuple[Path, ...]) -> str | None:
    """Return what is wrong with the tracker, in words that follow its name, or None."""
    try:
        text = (root / TRACKER).read_text().strip()
    except FileNotFoundError:
        return "is missing"
    if not text:
        return "is empty"
    if text != "release" and not text.isdecimal():
        return f"reads {text!r}"
    folder = root / text if text == "release" else iteration_folder(root, int(text))
    if is_usable(folder) or folder in taken_away:
        return None
    return f"names {folder.name}, which {'is not complete' if folder.exists() else 'is not there'}"


def mend(root: Path, damage: Damage) -> None:
    """Repair what ``find_leftovers`` returned, which after an interruption finds the rest again."""
    for folder in damage.taken_away:
        if folder.exists():  # not complete
            _remove(folder)
        os.rename(old_of(folder), folder)
    if damage.iteration is not None:
        with replacing(root / TRACKER) as file:
            file.write(str(damage.iteration))
    sync_folder(root)


def uses_object_store() -> bool:
    """Return whether Megatron's paths may be addresses in an object store."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    return bool(MultiStorageClientFeature.is_enabled())
