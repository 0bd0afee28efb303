"""Cut matrices of many shapes on their way between real processes; told what to do by one JSON argument."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from helpers.probes import Collectives, save
from sso_megatron import SSO
from sso_megatron.cli.bench.meters import PeakMemory
from sso_megatron.matrices.layout import ParameterLayout, Split, gate_up_splits, section_splits, whole
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.shards import Cut


@dataclass(frozen=True)
class DescentConfig:
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.01


class Descent(SpectralOptimizer):
    """Descent with momentum: all that the engine does around an algorithm, and no rounding of its own."""

    config_cls = DescentConfig
    works_on_shards = True

    def update_batch_(self, batch: Any, W: torch.Tensor, N: torch.Tensor) -> None:
        W.add_(N, alpha=-batch.group["lr"])

    def polar_work(self) -> PolarWork:
        return PolarWork(num_trials=2, num_steps=8)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return 2 * shape[0] * shape[1] * dtype.itemsize

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        return 2 * max(cut.lengths) * cut.shape[1 - cut.dim] * dtype.itemsize


def shard(kind: str, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's part of a whole parameter."""
    if kind == "fc1":  # gate above up on every rank
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    return value.chunk(size, dim=1 if kind in ("proj", "fc2") else 0)[rank].clone()


def parameters(hidden: int, layers: int, names: list[str]) -> dict[str, torch.Tensor]:
    """Whole parameters of a gated dense model whose feed-forward size is three times the hidden one."""
    gen = torch.Generator().manual_seed(0)
    h = hidden
    shapes = {"qkv": (2 * h, h), "proj": (h, h), "fc1": (6 * h, h), "fc2": (h, 3 * h)}
    return {
        f"layers.{layer}.{name}": torch.randn(shapes[name], generator=gen)
        for layer in range(layers)
        for name in names
    }


def layout(name: str, local: tuple[int, ...], hidden: int, size: int) -> ParameterLayout:
    kind = name.rpartition(".")[2]
    splits: tuple[Split, ...]
    if kind == "qkv":  # 32 heads, whole on their ranks
        rank, rows = dist.get_rank(), hidden // 16
        heads = [(f"head{rank * 32 // size + i}", rows) for i in range(32 // size)]
        splits = section_splits(local, heads, None, size)
    elif kind == "fc1":
        splits = gate_up_splits(local, 0 if size > 1 else None, size)
    else:
        splits = (whole(local, 1 if size > 1 else None, size),)
    return ParameterLayout(name, splits, dist.group.WORLD)


def kept(optimizer: SpectralOptimizer) -> int:
    """Bytes of what an optimizer keeps of its matrices."""
    caches = [vars(batch.cache).values() for batch in optimizer.batches if batch.cache]
    return sum(x.nbytes for cache in caches for x in cache if isinstance(x, torch.Tensor))


def dense() -> None:
    """Steps on a dense model. Saves this rank's parameters, and of the last step: collectives, peak of
    memory, and the order in which parameters were finished.

    The argument: ``hidden``, ``layers``, ``names`` (kinds of parameters), ``workspace_mib``, ``mode``,
    ``steps``, ``settings`` (of SSO; descent without), ``groups`` (number of parameter groups),
    ``without_gradient`` (names), ``measures_memory`` (of every step).
    """
    task = {"layers": 4, "names": ["qkv", "proj", "fc1", "fc2"], "workspace_mib": 512, "mode": "owner"}
    task |= {"steps": 2, "settings": None, "groups": 1, "without_gradient": [], "measures_memory": False}
    task |= json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    params, names = {}, {}
    for name, value in parameters(task["hidden"], task["layers"], task["names"]).items():
        params[name] = torch.nn.Parameter(shard(name.rpartition(".")[2], value, rank, size))
        names[id(params[name])] = name
    groups = [
        {"params": list(params.values())[i :: task["groups"]], "lr": 0.02 / (i + 1)}
        for i in range(task["groups"])
    ]
    shared = SpectralConfig(tp_mode=task["mode"], workspace_mib=task["workspace_mib"])

    def find_layout(param: torch.Tensor) -> ParameterLayout:
        return layout(names[id(param)], tuple(param.shape), task["hidden"], size)

    if task["settings"] is None:
        optimizer: SpectralOptimizer = Descent(groups, 0.1, shared=shared, find_layout=find_layout)
    else:
        optimizer = SSO(groups, shared=shared, find_layout=find_layout, **task["settings"])
    peaks: list[int] = []
    optimizer.init_state()
    for step in range(task["steps"]):
        for name, value in parameters(task["hidden"], task["layers"], task["names"]).items():
            if name not in task["without_gradient"]:
                gradient = (value * (step + 1)).sin()
                params[name].grad = shard(name.rpartition(".")[2], gradient, rank, size)
        finished: list[str] = []
        optimizer.on_written = lambda done, seen=finished: seen.extend(names[id(p)] for p in done)
        with Collectives() as seen, PeakMemory() if task["measures_memory"] else nullcontext() as memory:
            seen.next_step()
            optimizer.step()
        if memory is not None:
            # What the first step makes and keeps is state.
            peaks.append(memory.peak_bytes - (kept(optimizer) if not step else 0))
    save("peaks", peaks)
    save("final", {name: param.detach() for name, param in params.items()})
    save("collectives", seen.steps[0])
    save("finished", finished)
    save("batches", [(b.mode, b.shape, len(b.members), len(b.here)) for b in optimizer.batches])
    dist.destroy_process_group()


def two_groups() -> None:
    """Matrices cut over four ranks and others over each half of them; every rank lists them in its way."""
    task = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    gen = torch.Generator().manual_seed(0)
    params, layouts = {}, {}
    for i in range(24):
        is_expert = i % 3 > 0
        value = torch.randn(128, 192, generator=gen)
        if is_expert and i % 3 != 1 + rank // 2:
            continue
        tp_group, place, size = (halves[rank // 2], rank % 2, 2) if is_expert else (None, rank, 4)
        tp_group = tp_group or dist.group.WORLD
        name = f"matrix {i}"
        params[name] = torch.nn.Parameter(value.chunk(size)[place].clone())
        params[name].grad = params[name].detach().cos()
        layouts[id(params[name])] = ParameterLayout(name, (whole(params[name].shape, 0, size),), tp_group)
    order = sorted(params, key=lambda name: (int(name.split()[1]) * (rank + 3)) % 11)
    shared = SpectralConfig(tp_mode=task["mode"], workspace_mib=1)
    listed = [params[name] for name in order]
    optimizer = Descent(listed, 0.1, shared=shared, find_layout=lambda p: layouts[id(p)])
    for _ in range(2):
        optimizer.step()
    save("final", {name: param.detach() for name, param in params.items()})
    dist.destroy_process_group()
