"""Folders of checkpoints: nothing half-written is taken for one, and the last complete one is kept.

A checkpoint ``iter_0000010`` comes into being in steps, and a run may be killed between any two:

1. ``partial-iter_0000010`` fills; its manifest is written last;
2. where the iteration was saved before, that checkpoint becomes ``old-iter_0000010``;
3. the partial folder is renamed ``iter_0000010``;
4. the old one is removed, and the tracker file is replaced.

So a folder named ``iter_*`` is complete, unless something else than this made it. ``find_damage`` says what
is to be done after a run that ended half-way, ``mend`` does it. Both are for one process: they issue no
collectives, and know nothing of Megatron but the names of its files.

The other names do not begin with ``iter_``, because Megatron takes what follows that for a number when
it looks for old checkpoints (``cleanup_old_non_persistent_checkpoint``).
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
    """A folder of checkpoints that cannot be used as it is; the message says the way out."""


def partial_of(folder: Path) -> Path:
    """Where the checkpoint ``folder`` is written."""
    return folder.with_name(_PARTIAL + folder.name)


def old_of(folder: Path) -> Path:
    """Where an older checkpoint of the same iteration waits until ``folder`` is complete."""
    return folder.with_name(_OLD + folder.name)


def iteration_folder(root: Path, iteration: int) -> Path:
    """The checkpoint of an iteration, by Megatron's rule."""
    return root / f"iter_{iteration:07d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether Megatron gives a checkpoint this name, rather than a folder inside one."""
    return name == "release" or re.fullmatch(r"iter_\d{7,}", name) is not None


def is_complete(folder: Path) -> bool:
    """Whether all of a torch_dist checkpoint was written; what became of its files since is not asked.

    A manifest is the last file that goes into a folder. Megatron without this package writes none;
    its last one is ``metadata.json``.
    """
    return (folder / MANIFEST).is_file() or all((folder / name).is_file() for name in _METADATA)


def is_usable(folder: Path) -> bool:
    """Whether it is complete, or written with ``--ckpt-format torch``, which leaves no mark of that."""
    return is_complete(folder) or next(folder.glob("mp_rank_*"), None) is not None


def complete_iterations(root: Path, counts: Callable[[Path], bool] = is_complete) -> list[int]:
    """Iterations of all complete torch_dist checkpoints, oldest first.

    Args:
        root: the folder of checkpoints.
        counts: another rule than ``is_complete``.
    """
    found = [p for p in root.glob("iter_*") if is_checkpoint_name(p.name) and counts(p)]
    return sorted(int(p.name.removeprefix("iter_")) for p in found)


# ---------------------------------------------------------------- saving


def start_partial(folder: Path, sweep: bool) -> None:
    """Make an empty folder to write the checkpoint ``folder`` into: ``partial_of(folder)``.

    Args:
        folder: what it will be.
        sweep: also remove what earlier runs left of other checkpoints.
    """
    if sweep:
        _sweep(folder.parent)
    fresh = partial_of(folder)
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir(parents=True)


def _sweep(root: Path) -> None:
    """Remove partial folders, and old ones whose successor is complete."""
    for left in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left)
    for left in root.glob(f"{_OLD}*"):
        if is_usable(root / left.name.removeprefix(_OLD)):
            _remove(left)


def publish(folder: Path) -> None:
    """Make the complete partial folder of ``folder`` the checkpoint.

    At every moment there is a complete checkpoint of the iteration if there was one before.
    """
    old = old_of(folder)
    if is_usable(folder):
        if old.exists():  # a run ended before it had removed it
            _remove(old)
        os.rename(folder, old)
    elif folder.exists():  # Megatron makes it, empty
        _remove(folder)
    os.rename(partial_of(folder), folder)
    sync_folder(folder.parent)
    if old.exists():
        _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or the link by which somebody has put it elsewhere."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write; it takes the place of ``path`` when the block ends, all at once."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w") as file:
        yield file
        sync_file(file)
    os.replace(fresh, path)
    sync_folder(path.parent)


def sync_file(file: IO[str]) -> None:
    """Return when what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return when the names in ``folder`` are on the disk; a rename is not before that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- after a run that ended half-way


@dataclass(frozen=True)
class Damage:
    """What ``mend`` has to do.

    Attributes:
        taken_away: checkpoints whose ``old_of`` is to come back.
        iteration: what the tracker is to say, or None if it is right.
        found: what was found, in words.
    """

    taken_away: tuple[Path, ...]
    iteration: int | None
    found: str

    @property
    def line(self) -> str:
        """What was found and what is done about it."""
        if self.iteration is None:
            return self.found
        return f"{self.found}; it now names iteration {self.iteration}, the newest complete checkpoint"


def find_damage(root: Path) -> Damage | None:
    """What a run that ended half-way left in a folder of torch_dist checkpoints. Changes nothing.

    A tracker that names a complete checkpoint is right, also where a newer one is there: somebody may
    have gone back on purpose.

    Raises:
        FolderError: the tracker is of no use, and no complete checkpoint is there.
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
    """What is wrong with the tracker, in words that follow its name."""
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
    """Do what ``find_damage`` found; a run that is killed in here leaves what it finds again."""
    for folder in damage.taken_away:
        if folder.exists():  # not complete
            _remove(folder)
        os.rename(old_of(folder), folder)
    if damage.iteration is not None:
        with replacing(root / TRACKER) as file:
            file.write(str(damage.iteration))
    sync_folder(root)
