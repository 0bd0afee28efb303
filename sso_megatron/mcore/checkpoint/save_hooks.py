"""Hooks into Megatron's saving: they save to a partial folder, add a manifest, and replace the tracker.

They serve every optimizer. They do not change saving to object stores (``--enable-msc``), whose folders
cannot be renamed. For formats other than torch_dist they only replace the tracker.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sso_megatron.mcore.checkpoint import folders, manifest, stacked_keys
from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.errors.collective_exit import check_together, on_first_rank


def install() -> None:
    """Hook into Megatron's saving.

    Raises:
        UnsupportedError: this Megatron-Core lacks one of the functions.
    """
    private_api.wrap("megatron.core.dist_checkpointing:save", _into_partial_folder)
    # Megatron opens other files with this function, too; only the tracker is opened in another way.
    private_api.wrap(private_api.tracker_opener(), _with_tracker_replaced)


_swept: set[Path] = set()
"""Folders of checkpoints that this run has saved into, hence cleaned of what earlier runs left."""


def _into_partial_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    def save(
        sharded_state_dict: Any,
        checkpoint_dir: Any,
        *args: Any,
        verify_integrity: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save as Megatron does, but so that the folder exists only when it is complete.

        Collectives: Megatron's, before them a broadcast and two gathers of objects, and after them those of
        ``_finish``, which an asynchronous save issues when it is finalised.
        """
        stacked_keys.divide_(sharded_state_dict)
        folder = Path(checkpoint_dir)
        if folders.uses_object_store() or not folders.is_checkpoint_name(folder.name):
            return original(
                sharded_state_dict, checkpoint_dir, *args, verify_integrity=verify_integrity, **kwargs
            )
        sweep, partial = folder.parent not in _swept, folders.partial_of(folder)
        on_first_rank(lambda: folders.start_partial(folder, sweep))
        _swept.add(folder.parent)
        check_together(lambda: None if partial.is_dir() else _not_shared(folder))
        # verify_integrity is not passed on: the manifest is written anyway, and by all ranks.
        request = original(sharded_state_dict, str(partial), *args, **kwargs)
        if request is None:
            _finish(folder)
        else:  # Megatron later adds the function that writes the tracker
            request.finalize_fns.append(lambda: _finish(folder))
        return request

    return save


def _finish(folder: Path) -> None:
    """Write the manifest of a partial folder and rename it to the checkpoint's final name.

    Collectives: those of ``manifest.write`` and a broadcast, after which the folder exists.
    """
    manifest.write(folders.partial_of(folder))
    on_first_rank(lambda: folders.publish(folder))


def _not_shared(folder: Path) -> str:
    return (
        f"--save {folder.parent} is not the same folder on {socket.gethostname()} as on the first rank's "
        "node; name one on a file system that all nodes share"
    )


def _with_tracker_replaced(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the tracker atomically: Megatron empties it first, and a run killed then leaves it empty."""

    def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        is_tracker = Path(path).name == folders.TRACKER
        if folders.uses_object_store() or not is_tracker or mode != "w":
            return private_api.open_with_store(path, mode, *args, **kwargs)
        return folders.replacing(Path(path))

    return open_file
