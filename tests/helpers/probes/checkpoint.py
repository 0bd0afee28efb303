"""Functions that a rank runs to die while it saves, to save in the background, or to load with trouble."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def allow_async_save() -> None:
    """Save in the background, which the rehearsal refuses, with what a rehearsal would need for it.

    Megatron's worker comes from a fresh process, which knows nothing of the rehearsal and divides by the
    number of CUDA devices; a forked one knows. And it copies tensors to the host before training goes on,
    which copies nothing here: the worker would write what training has made of them meanwhile.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import initialize

    from sso_megatron.mcore.rehearsal import rehearsal

    rehearsal._REFUSALS = tuple(refusal for refusal in rehearsal._REFUSALS if refusal.name != "async_save")
    start, preload = initialize.init_persistent_async_worker, FileSystemWriterAsync.preload_tensors

    def preload_tensors(write_buckets: Any, non_blocking: bool = True) -> Any:
        return [
            (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (data, tensors) in preload(write_buckets, non_blocking)
        ]

    preload_tensors.__qualname__ = "FileSystemWriterAsync.preload_tensors"  # it travels by its name
    preload_tensors.__module__ = FileSystemWriterAsync.__module__
    FileSystemWriterAsync.preload_tensors = staticmethod(preload_tensors)
    initialize.init_persistent_async_worker = lambda rank, mp_mode: start(rank, "fork")


def fail_on_rank_1() -> None:
    """Have one rank fail while it loads tensors; the other goes on to a barrier."""
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    load = TorchDistLoadShardedStrategy.load

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise RuntimeError("the disk\nis on fire")
        result = load(self, *args, **kwargs)
        torch.distributed.barrier()
        return result

    TorchDistLoadShardedStrategy.load = fail


def ask_for_optional_state() -> None:
    """Have the optimizer ask for objects that it can do without, as nested as they come."""
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.training import checkpointing

    from sso_megatron.mcore.parameters.names import OPTIONAL_STATE

    original = checkpointing.generate_state_dict

    def generate_state_dict(*args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        rank = int(os.environ["RANK"])
        state["optimizer"].setdefault("spectral", {}).update(
            {n: ShardedObject(OPTIONAL_STATE + n, None, (1,), (0,), replica_id=rank) for n in "ab"}
        )
        return state

    checkpointing.generate_state_dict = generate_state_dict


POINTS = (
    *("before metadata.json", "after metadata.json", "before manifest", "after manifest"),
    *("before publish", "before tracker", "between renames", "in tracker", "after tracker"),
)
"""Where rank 0 can be killed by name. Between renames there is only where an iteration is saved again."""


def die() -> None:
    """Kill this rank as ``plan.json`` beside the folder of checkpoints says: at a point, or some way in."""
    plan = json.loads((_beside_checkpoints() / "plan.json").read_text())
    saves = time_saves()
    if plan["rank"] != int(os.environ["RANK"]):
        return
    saves.last, saves.part = plan["save"], plan["part"]
    if plan["point"] is not None:
        _KILLS[plan["point"]](lambda *args: saves.kill_in_the_last())


def time_saves() -> "_Saves":
    """Note how long this rank's saves take, for later runs that are to die some way into one."""
    saves = _Saves()
    _around(_training(), "save_checkpoint", before=saves.begin, after=saves.end)
    return saves


def _beside_checkpoints() -> Path:
    return Path(sys.argv[sys.argv.index("--save") + 1]).parent


class _Saves:
    """Times the saves of this rank, which may be killed in a certain one.

    Attributes:
        last: the save that it is killed in; None: in none.
        part: how much of a save's time may pass before it is killed, by how long the one before took; at
            its end at the latest, should this one be faster. None: it is not killed for its time.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last: int | None = None
        self.part: float | None = None
        self._seconds = _beside_checkpoints() / f"seconds{os.environ['RANK']}"

    def begin(self, *args: Any) -> None:
        self.count += 1
        self._began = time.monotonic()
        if self.count == self.last and self.part is not None:
            threading.Timer(self.part * float(self._seconds.read_text()), self._kill_in_time).start()

    def end(self, *args: Any) -> None:
        if self.count == self.last and self.part is not None:
            _kill()
        self._seconds.write_text(str(time.monotonic() - self._began))

    def kill_in_the_last(self) -> None:
        if self.count == self.last:
            _kill()

    def _kill_in_time(self) -> None:
        Path("in_time").touch()
        _kill()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _training() -> Any:
    from megatron.training import training

    return training


def _serialization() -> Any:
    from megatron.core.dist_checkpointing import serialization

    return serialization


def _ours(name: str) -> Any:
    from sso_megatron.mcore.checkpoint import folders, manifest

    return {"folder": folders, "manifest": manifest}[name]


Hook = Callable[..., None]


def _around(owner: Any, name: str, before: Hook | None = None, after: Hook | None = None) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def _between_renames(kill: Hook) -> None:
    folder = _ours("folder")

    def if_old_is_away(source: Path, target: Path) -> None:
        if folder.old_of(target).exists():
            kill()

    _around(folder.os, "rename", before=if_old_is_away)


def _around_tracker(
    before: Hook | None = None, inside: Hook | None = None, after: Hook | None = None
) -> None:
    folder = _ours("folder")
    original = folder.replacing

    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[Any]:
        if before is not None:
            before()
        with original(path) as file:
            yield file
            if inside is not None:
                inside()
        if after is not None:
            after()

    folder.replacing = replacing


_KILLS: dict[str, Callable[[Hook], None]] = {
    "before metadata.json": lambda kill: _around(_serialization(), "save_config", before=kill),
    "after metadata.json": lambda kill: _around(_serialization(), "save_config", after=kill),
    "before manifest": lambda kill: _around(_ours("manifest"), "_write", before=kill),
    "after manifest": lambda kill: _around(_ours("manifest"), "_write", after=kill),
    "before publish": lambda kill: _around(_ours("folder"), "publish", before=kill),
    "between renames": _between_renames,
    "before tracker": lambda kill: _around_tracker(before=kill),
    "in tracker": lambda kill: _around_tracker(inside=kill),
    "after tracker": lambda kill: _around_tracker(after=kill),
}


def freeze() -> None:
    """Freeze the weights in whose global name the regular expression ``FREEZE`` is found."""
    from megatron.training.models import gpt

    original, pattern = gpt.unimodal_build_distributed_models, os.environ["FREEZE"]

    @functools.wraps(original)
    def build(build_model: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core import mpu
        from megatron.core.utils import get_model_config

        from sso_megatron.mcore.parameters.names import global_names

        def build_frozen(*a: Any, **k: Any) -> Any:
            model = build_model(*a, **k)
            num_experts = get_model_config(model).num_moe_experts or 0
            first = mpu.get_expert_model_parallel_rank() * num_experts
            rename = global_names(model, first // mpu.get_expert_model_parallel_world_size())
            for name, param in model.named_parameters():
                if re.search(pattern, rename(name)):
                    param.requires_grad_(False)
            return model

        return original(build_frozen, *args, **kwargs)

    gpt.unimodal_build_distributed_models = build


def fail_in_the_second_save() -> None:
    """Have Megatron's second save end with an error before its last file is written."""
    calls = itertools.count(1)

    def fail(*args: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("this save fails")

    _around(_serialization(), "save_config", before=fail)
