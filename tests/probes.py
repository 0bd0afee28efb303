"""Functions that a rank runs beside or instead of training, to look at real objects by value."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def save(name: str, value: object) -> None:
    torch.save(value, Path(f"{name}{os.environ['RANK']}.pt"))


def around_train(before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
    """Have Megatron's loop call ``before(model, optimizer)`` and ``after(model, optimizer)``."""
    from megatron.training import training

    original = training.train

    @functools.wraps(original)
    def train(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(model, optimizer)
        try:
            return original(forward_step, model, optimizer, *args, **kwargs)
        finally:
            if after is not None:
                after(model, optimizer)

    training.train = train


def spectral_optimizers(optimizer: Any) -> list[Any]:
    from sso_megatron.mcore.registration import spectral_parts

    return spectral_parts(optimizer)


def settings() -> None:
    """Save what the built optimizers hold, and stop before training."""

    def look(model: Any, optimizer: Any) -> None:
        found = spectral_optimizers(optimizer)
        routes = {}
        for part in optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    routes[id(param)] = type(part.optimizer).__name__
        names = {}
        for chunk in model:
            for name, param in chunk.named_parameters():
                names[name] = routes[id(getattr(param, "main_param", param))]
        batches = [batch for o in found for batch in o.batches]
        save(
            "settings",
            {
                "class": type(found[0]).__name__,
                "config": dataclasses.asdict(found[0].config),
                "shared": dataclasses.asdict(found[0].shared),
                "groups": [{k: v for k, v in g.items() if k != "params"} for g in found[0].param_groups],
                "matrices": {m.name: m.split.shape for b in batches for m in b.members},
                "batches": [(len(b.members), b.shape) for b in batches],
                "dtypes": {str(m.param.dtype) for b in batches for m in b.members},
                "routes": names,
            },
        )
        sys.stdout.flush()
        os._exit(0)

    around_train(look, None)


def _whole_weights(built: Any) -> dict[str, torch.Tensor]:
    """Every logical matrix of this rank, whole, by name."""
    return {
        member.name: weight.clone()
        for optimizer in spectral_optimizers(built)
        for batch in optimizer.batches
        for member, weight in zip(batch.members, batch.gather_weights(), strict=True)
    }


def _retracted(built: Any) -> dict[str, tuple[torch.Tensor, float]]:
    return {
        name: (weight.clone(), radius)
        for optimizer in spectral_optimizers(built)
        for name, weight, radius in optimizer.retracted()
    }


def weights() -> None:
    """Save whole logical matrices before and after training, and the retracted ones after it."""
    around_train(
        lambda model, optimizer: save("initial", _whole_weights(optimizer)),
        lambda model, optimizer: (
            save("final", _whole_weights(optimizer)),
            save("retracted", _retracted(optimizer)),
            save("momentum", momenta(optimizer)),
        ),
    )


def momenta(built: Any) -> dict[str, torch.Tensor]:
    """Whole momentum of every logical matrix of this rank, by name."""
    return {
        member.name: buffer.clone()
        for optimizer in spectral_optimizers(built)
        for batch in optimizer.batches
        for member, buffer in zip(
            batch.members,
            batch.gather(
                [m.split.read(optimizer.state[m.param]["momentum_buffer"]) for m in batch.members]
            ),
            strict=True,
        )
    }


def loaded_momentum() -> None:
    """Save the momentum that a checkpoint gave, before training goes on."""
    around_train(lambda model, optimizer: save("loaded", momenta(optimizer)), None)


def no_process_group() -> None:
    """Leave a mark if a process group is made."""
    original = torch.distributed.init_process_group

    def marked(*args: Any, **kwargs: Any) -> Any:
        Path("process_group_was_made").touch()
        return original(*args, **kwargs)

    torch.distributed.init_process_group = marked


def count_collectives() -> None:
    """Save how many all-gathers each optimizer step issues, and their bytes."""
    import torch.distributed as dist

    from sso_megatron.optimizers.base import SpectralOptimizer

    original, step = dist.all_gather_into_tensor, SpectralOptimizer.step
    seen: list[list[int]] = []

    def gather(output: Any, *args: Any, **kwargs: Any) -> Any:
        seen[-1].append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    def counted(self: Any, closure: Any = None) -> Any:
        seen.append([])
        dist.all_gather_into_tensor = gather
        try:
            return step(self, closure)
        finally:
            dist.all_gather_into_tensor = original
            save("collectives", seen)

    SpectralOptimizer.step = counted


def sharded_step() -> None:
    """Ten steps of SSO on matrices cut over the world, without Megatron; save the whole results."""
    import torch.distributed as dist

    from sso_megatron import SSO
    from sso_megatron.matrices.layout import ParameterLayout, whole

    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    gen = torch.Generator().manual_seed(0)
    shapes = {
        "rows": (24, 35, 0),
        "columns": (35, 24, 1),
        "more rows": (24, 35, 0),
        "uncut": (10, 14, None),
    }
    params, layouts, gradients, names = [], {}, [], []
    for name, (m, n, dim) in shapes.items():
        value = torch.randn(m, n, generator=gen)
        steps = torch.randn(10, m, n, generator=gen)
        if dim is not None:
            value, steps = value.chunk(size, dim)[rank], steps.chunk(size, dim + 1)[rank]
        param = torch.nn.Parameter(value.clone())
        cut = dim if size > 1 else None
        split = whole(param.shape, cut, size if cut is not None else 1)
        layouts[id(param)] = ParameterLayout(name, (split,), dist.group.WORLD)
        params.append(param)
        gradients.append(steps)
        names.append(name)
    optimizer = SSO(params, lr=0.02, find_layout=lambda p: layouts[id(p)])
    for i in range(10):
        for param, steps in zip(params, gradients, strict=True):
            param.grad = steps[i].clone()
        optimizer.step()
    save("shapes", {name: layouts[id(p)].splits[0].shape for name, p in zip(names, params, strict=True)})
    save("whole", {name: matrix for name, matrix, _ in optimizer.retracted()})
    dist.destroy_process_group()
