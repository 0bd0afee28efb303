"""Sharded matrices over real process groups, without Megatron; told what to do by one JSON argument."""

import json
import sys
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

import sso_megatron
from helpers.numerics.host_reads import NoHostReads
from helpers.probes import Collectives, save
from sso_megatron import SSO
from sso_megatron.cli.bench.meters import HostSyncs
from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.schedule import make_schedule


def shard_of(whole: torch.Tensor, dim: int | None, rows: list[int] | None) -> torch.Tensor:
    """This rank's part of ``(..., m, n)``: the tests' own idea of a cut."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if dim is None:
        return whole
    if rows is not None:
        start = [0, *accumulate(rows)][rank]
        return whole[..., start : start + rows[rank], :]
    length = whole.size(dim - 2) // size
    return whole.narrow(dim - 2, rank * length, length)


def whole_of(shard: torch.Tensor) -> list[torch.Tensor]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, shard)
    return parts


def gradients_of(m: int, n: int, steps: int, kind: str, gen: torch.Generator) -> torch.Tensor:
    noise = torch.randn(steps, m, n, generator=gen)
    if kind == "noise":
        return noise
    U, _, Vt = torch.linalg.svd(noise, full_matrices=False)
    return (U * torch.logspace(0, -5, min(m, n))) @ Vt  # every step as ill-conditioned as they come


def train() -> None:
    """Steps of an optimizer on matrices cut over the world.

    Saves every whole matrix; of SSO its retracted ones and radii, of others what is kept of each; the modes
    of the batches; and the collectives of every step. The argument: ``optimizer`` (SSO by default),
    ``matrices`` (name to ``[m, n, dim, rows by rank]``), ``mode``, ``steps``, ``gradients`` (``noise`` or
    ``decaying``), ``settings``, ``without_gradient`` (names), ``lrs`` (of each parameter group, which take
    turns), ``workspace_mib``.
    """
    task = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    gen = torch.Generator().manual_seed(0)
    params, layouts, gradients = {}, {}, {}
    for name, (m, n, dim, rows) in task["matrices"].items():
        whole = torch.randn(m, n, generator=gen)
        steps = gradients_of(m, n, task["steps"], task["gradients"], gen)
        dim, rows = (dim, rows) if size > 1 else (None, None)
        value, gradients[name] = shard_of(whole, dim, rows), shard_of(steps, dim, rows)
        local = value.size(0)
        held = ((0, local),) if local else ()
        splits = [Split("", held, (m, n), dim, None if rows is None else tuple(rows))]
        if rows is not None:  # no parameter is ever empty: two more rows, another matrix, below
            below = torch.eye(2, n)
            value = torch.cat([value, below])
            gradients[name] = torch.cat([gradients[name], below.expand(task["steps"], -1, -1)], dim=1)
            splits.append(Split(f"below{rank}", ((local, local + 2),), (2, n), None))
        params[name] = torch.nn.Parameter(value.clone())
        layouts[id(params[name])] = ParameterLayout(name, tuple(splits), dist.group.WORLD)
    order = list(params)
    if rank % 2 and task.get("shuffle"):
        order.reverse()  # what differs in shape may come in any order
    without = task.get("without_gradient", [])
    lrs = task.get("lrs", [0.02])
    numbers = {name: number % len(lrs) for number, name in enumerate(params)}
    members = [[params[name] for name in order if numbers[name] == i] for i in range(len(lrs))]
    optimizer = getattr(sso_megatron, task.get("optimizer", "SSO"))(
        [{"params": group, "lr": lr} for group, lr in zip(members, lrs, strict=True)],
        shared=SpectralConfig(tp_mode=task["mode"], workspace_mib=task.get("workspace_mib", 512)),
        find_layout=lambda p: layouts[id(p)],
        **task.get("settings", {}),
    )
    with Collectives() as seen:
        for i in range(task["steps"]):
            for name, param in params.items():
                param.grad = None if name in without else gradients[name][i].clone()
            seen.next_step()
            if isinstance(optimizer, sso_megatron.SpectralClip):
                optimizer.pre_clip_()
            optimizer.step()
    save("collectives", seen.steps)
    save("modes", {member.name: batch.mode for batch in optimizer.batches for member in batch.members})
    if isinstance(optimizer, SSO):
        named = [entry for entry in optimizer.retracted() if "[below" not in entry[0]]
        save("radii", {name: radius for name, _, radius in named})
        save("retracted", {name: matrix.clone() for name, matrix, _ in named})
    else:
        kept = optimizer.spectral_state().items()
        save("states", {(name, k): v for name, s in kept if "[below" not in name for k, v in s.items()})
    # Put together by the tests' own means, not by the optimizer's.
    finals = {}
    for name, (_, _, dim, rows) in task["matrices"].items():
        value = params[name].detach()
        if rows is not None and size > 1:
            value = value[: rows[rank]]
        finals[name] = value if dim is None or size == 1 else torch.cat(whole_of(value), dim)
    save("final", finals)
    dist.destroy_process_group()


def two_groups() -> None:
    """Matrices of one shape over two groups of the same ranks, in opposite orders on the two ranks."""
    dist.init_process_group("gloo")
    rank, groups = dist.get_rank(), [dist.new_group([0, 1]), dist.new_group([0, 1])]
    values = torch.randn(2, 24, 36, generator=torch.Generator().manual_seed(0))
    params, layouts = [], {}
    for number, tp_group in enumerate(groups):
        params.append(torch.nn.Parameter(values[number].chunk(2)[rank].clone()))
        split = Split("", ((0, 12),), (24, 36), 0)
        layouts[id(params[-1])] = ParameterLayout(f"matrix {number}", (split,), tp_group)
    mode = SpectralConfig(tp_mode=json.loads(sys.argv[1])["mode"])
    ordered = params[::-1] if rank else params
    optimizer = SSO(ordered, lr=0.02, shared=mode, find_layout=lambda p: layouts[id(p)])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    save("retracted", {name: matrix for name, matrix, _ in optimizer.retracted()})
    dist.destroy_process_group()


def dead_weight() -> None:
    """A matrix of zeros among three, which one rank alone would own; every rank tells what it saw."""
    dist.init_process_group("gloo")
    values = [torch.ones(8, 8), torch.ones(8, 8), torch.zeros(8, 8)]
    params = [torch.nn.Parameter(value.chunk(2)[dist.get_rank()].clone()) for value in values]
    layouts = {
        id(p): ParameterLayout(f"matrix {i}", (Split("", ((0, 4),), (8, 8), 0),), dist.group.WORLD)
        for i, p in enumerate(params)
    }
    for param in params:
        param.grad = torch.ones_like(param)
        param.requires_grad_(False)  # as Megatron's master copies are
    mode = SpectralConfig(tp_mode=json.loads(sys.argv[1])["mode"])
    try:
        SSO(params, lr=0.02, shared=mode, find_layout=lambda p: layouts[id(p)]).step()
    except ValueError as error:
        save("error", str(error))
    dist.destroy_process_group()


def parts_of_a_large_model() -> None:
    """How many matrices each rank works on, by batch, for shapes and layers of the argument."""
    dist.init_process_group("gloo")
    task, size = json.loads(sys.argv[1]), dist.get_world_size()
    m, n, dim = task["shape"]
    split = Split("", ((0, m if dim else m // size),), (m, n), dim)
    params = [torch.empty(0, device="meta") for _ in range(task["layers"])]
    names = {id(p): f"layer {i:02}" for i, p in enumerate(params)}
    batches = make_schedule(
        [{"params": params}],
        lambda group, i: ParameterLayout(names[id(group["params"][i])], (split,), dist.group.WORLD),
        SpectralConfig(),
        SSO([torch.nn.Parameter(torch.ones(2, 2))]),
    ).batches
    save("parts", [(batch.mode, len(batch.members), len(batch.here)) for batch in batches])
    dist.barrier()  # a rank that leaves early breaks the others' connecting
    dist.destroy_process_group()


def train_guarded() -> None:
    """``train`` with its steps by turns counted and guarded, but for the first."""
    step, seen = SpectralOptimizer.step, []

    def watched(self: Any, closure: Any = None) -> Any:
        with NoHostReads() if len(seen) % 2 else HostSyncs() as guard:
            result = step(self, closure)
        seen.append(dict(guard.sources) if isinstance(guard, HostSyncs) else {})
        save("syncs", seen)
        return result

    SpectralOptimizer.step = watched
    train()
