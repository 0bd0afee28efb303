"""Ends all ranks together when one of them cannot go on: one line, exit code 2, no rank left waiting.

A rank that raises while the others are in a collective leaves them there until a timeout of many minutes,
unless a launcher kills them.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sso_megatron.mcore.errors import fail

_ERROR, _HEARD = "sso_megatron/error", "sso_megatron/heard"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0
"""How long a failing rank waits until the others have read its error; it may be the store's host."""


ERRORS = (Exception, CheckpointException)
"""Classes that a load may raise; torch's ``CheckpointException`` is no ``Exception``."""


class CheckpointError(Exception):
    """Reports in one line a checkpoint that cannot be saved or loaded: the file or key, and the way out."""


def cause_of(error: BaseException) -> str:
    """Return class and text of an error, or of the first rank's error in a ``CheckpointException``."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


def check_together(check: Callable[[], str | None]) -> None:
    """End all ranks if ``check`` finds an error on any of them, and show the error of the lowest such rank.

    Collectives: one gather of objects over the world, if there is a process group.

    Args:
        check: returns what is wrong, or None. An exception that it raises counts as an error, too.
    """
    try:
        mine = check()
    except ERRORS as error:  # any of them: the other ranks are waiting in the gather below
        traceback.print_exc()
        mine = cause_of(error)
    errors: list[Any] = [mine]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, mine)
    found = [text for text in errors if text is not None]
    if found:
        fail(_one_line(found[0]))


def on_first_rank(write: Callable[[], None]) -> None:
    """Have rank 0 call ``write``, which changes files, while the other ranks wait.

    Collectives: a broadcast of an object over the world.

    Raises:
        OSError: ``write`` raised one on rank 0; then every rank raises it.
    """
    error: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as failure:
            error[0] = str(failure)
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise OSError(error[0])


@contextlib.contextmanager
def exit_together(
    describe: Callable[[BaseException], str] = str, errors: tuple[type[BaseException], ...] = ERRORS
) -> Iterator[None]:
    """Run a block that all ranks run, and end all of them within seconds if one of them raises.

    An error of Megatron's or torch's is shown with its traceback, one of this package without.

    During the block a thread asks the process group's store whether a rank has failed.

    Collectives: a barrier at the end of the block. Without a process group only this rank ends.

    Args:
        describe: returns the text to show for an exception.
        errors: classes of the exceptions that end all ranks; others are raised, and end this rank alone.
    """
    store = _own_connection() if dist.is_initialized() else None
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, done), daemon=True)
    if store is not None:
        watcher.start()
    try:
        yield
        if store is not None:
            dist.barrier()  # a rank that has finished must still learn that another has failed
    except errors as error:  # whatever ends one rank must end all
        done.set()
        if not _is_ours(error):
            traceback.print_exc()
        line = _one_line(describe(error))
        if store is not None:
            line = _agree_on_first(store, line)
        fail(line)
    finally:
        done.set()
        if store is not None:
            watcher.join()


def _is_ours(error: BaseException) -> bool:
    """Return whether code of this package raised an error, which then explains itself."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("sso_megatron.")


def _own_connection() -> Any:
    """Return a second connection to the store; the first is blocked while the process group waits."""
    return dist.distributed_c10d._get_default_store().clone()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _agree_on_first(store: Any, line: str) -> str:
    """Write the error to the store unless one is there, and give all ranks time to read it.

    Returns:
        The first error in the store. Later errors often say only that a rank has gone.
    """
    mine = f"{dist.get_rank()} {line}"
    with contextlib.suppress(dist.DistError):  # the rank that hosts the store has ended already
        first = store.compare_set(_ERROR, "", mine).decode()
        heard = store.add(_HEARD, int(first != mine))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while heard < dist.get_world_size() - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 5)
            heard = store.add(_HEARD, 0)
        if dist.get_rank() == 0:  # it often hosts the store, which the others poll until they have read it
            time.sleep(_POLL_SECONDS)
        return _without_rank(first)
    return line


def _without_rank(entry: str) -> str:
    return entry.partition(" ")[2]


def _watch(store: Any, done: threading.Event) -> None:
    while not done.wait(_POLL_SECONDS):
        try:
            if not store.check([_ERROR]):
                continue
            line = _without_rank(store.get(_ERROR).decode())
            store.add(_HEARD, 1)
        except dist.DistError:  # the store is gone, and with it the rank that hosts it
            line = "the first rank has ended while a checkpoint was loaded; its own output says why"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"sso_megatron: error: {line}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # the main thread is in a collective and cannot be interrupted
