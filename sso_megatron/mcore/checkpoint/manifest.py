"""Writes and checks a checkpoint's manifest: the SHA-256 of each file, in Megatron's ``integrity.json``.

Megatron writes the manifest on demand (``--verify-integrity``) and on one rank. Here it is always written,
since it marks a checkpoint as complete, and all ranks share the hashing.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sso_megatron.mcore.checkpoint.folders import MANIFEST, sync_file, sync_folder
from sso_megatron.mcore.errors.collective_exit import on_first_rank

_ALGORITHM = "sha256"
"""The only hash that Megatron 0.19 knows (``validation._HASH_ALGORITHM``)."""


def write(folder: Path) -> None:
    """Hash every file of a checkpoint and write the manifest, durably.

    Afterwards all files are on the disk. Megatron's writer and torch's have synced the tensors and
    ``.metadata`` before; this function syncs ``metadata.json``, the manifest and the names. Otherwise a
    power failure could keep the rename that follows and lose what was renamed.

    Collectives: a gather of objects over the world, and a broadcast of one.

    Raises:
        OSError: a rank could not read its share, or the first rank could not write; every rank raises it.
    """
    size = dist.get_world_size()
    hashes: dict[str, str] = {}
    error = None
    try:
        # Each rank lists its own files: a network file system may not show them to the other ranks yet.
        names = (p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
        mine = [name for name in names if _writer(name, size) == dist.get_rank()]
        hashes = {name: _hash(folder / name) for name in mine}
    except OSError as failure:  # raised below on all ranks: here the others would wait for this one
        error = str(failure)
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, (hashes, error))
    errors = [failure for _, failure in parts if failure is not None]
    if errors:
        raise OSError(f"cannot hash {folder}: {errors[0]}")
    together = {name: digest for part, _ in parts for name, digest in part.items()}
    on_first_rank(lambda: _write(folder, together))


def _writer(name: str, size: int) -> int:
    """Return the rank that wrote a file, whose node has it in memory; rank 0 for files of no rank."""
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) % size if match else 0


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _ALGORITHM).hexdigest()


def _write(folder: Path, hashes: dict[str, str]) -> None:
    with (folder / "metadata.json").open("r+") as file:
        sync_file(file)
    with (folder / MANIFEST).open("w") as file:
        json.dump({"algorithm": _ALGORITHM, "files": dict(sorted(hashes.items()))}, file, indent=2)
        sync_file(file)
    sync_folder(folder)


def find_damaged_file(folder: Path, rank: int = 0, size: int = 1, reads: bool = True) -> str | None:
    """Return in words the first damaged file in a rank's share of a checkpoint, or None.

    Without a manifest nothing is checked. No collectives.

    Args:
        folder: the checkpoint.
        rank: this rank's number among the ranks that share the work.
        size: number of ranks that share the work.
        reads: read each file once and compare its hash; otherwise compare only ``.metadata``, which is
            small, and check that the other files exist.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        algorithm, hashes = manifest["algorithm"], sorted(manifest["files"].items())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or without the expected fields
        return f"{folder / MANIFEST} is damaged: it is no manifest"
    if algorithm != _ALGORITHM:
        return f"{folder / MANIFEST} is damaged: it names the algorithm {algorithm!r}, not {_ALGORITHM!r}"
    for name, expected in hashes[rank::size]:
        if not reads and name != ".metadata" and (folder / name).is_file():
            continue
        try:
            found = _hash(folder / name)
        except FileNotFoundError:
            return f"{folder / name} is missing"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if found != expected:
            length = (folder / name).stat().st_size
            return f"{folder / name} is damaged: its {length} bytes are not those that were saved"
    return None
