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
    from sso_megatron.mcore.optimizer.registration import spectral_optimizers as found_in

    return found_in(optimizer)


def settings() -> None:
    """Save what the built optimizers hold, and stop before training."""

    def look(model: Any, optimizer: Any) -> None:
        found = spectral_optimizers(optimizer)
        routes = {}
        for part in optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    routes[id(param)] = type(part.optimizer).__name__
        names, deviations = {}, {}
        for chunk in model:
            for name, param in chunk.named_parameters():
                names[name] = routes[id(getattr(param, "main_param", param))]
                deviations[name] = param.float().std(correction=0).item()
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
                "deviations": deviations,
            },
        )
        sys.stdout.flush()
        os._exit(0)

    around_train(look, None)


def without_a_private_name() -> None:
    """Take a function from Megatron that the plugin hooks."""
    import megatron.core.optimizer as factory

    del factory._get_megatron_emerging_optimizer


def missing_private_names() -> None:
    """Save the private names that this version of Megatron lacks, though the plugin uses them in it."""
    from sso_megatron.mcore.compat import private_api, private_names, versions
    from sso_megatron.mcore.errors import UnsupportedError

    missing = []
    for path, private in private_names.PRIVATE_NAMES.items():
        if private.only is None or str(versions.megatron_version()).startswith(f"{private.only}."):
            try:
                private_api.existing(path)
            except (UnsupportedError, ImportError) as error:
                missing.append((path, str(error)))
    save("missing", missing)


def with_adapter() -> None:
    """Give the model a matrix of a kind that nobody knows."""
    from megatron.core.models.gpt import GPTModel

    construct = GPTModel.__init__

    def construct_with_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.adapter = torch.nn.Linear(8, 8, bias=False)

    GPTModel.__init__ = construct_with_adapter


def whole_weights(optimizers: list[Any]) -> dict[str, torch.Tensor]:
    """Every logical matrix of this rank that spectral optimizers step on, whole, by name."""
    return {
        member.name: weight.clone()
        for optimizer in optimizers
        for batch in optimizer.batches
        for member, weight in zip(batch.members, batch.whole(batch.weights()), strict=True)
    }


def retracted(optimizers: list[Any]) -> dict[str, tuple[torch.Tensor, float]]:
    """Matrices and radii of those optimizers that keep them on spheres."""
    return {
        name: (weight.clone(), radius)
        for optimizer in optimizers
        if hasattr(optimizer, "retracted")
        for name, weight, radius in optimizer.retracted()
    }


def weights() -> None:
    """Save whole logical matrices before and after training, and the retracted ones after it."""

    def before(model: Any, optimizer: Any) -> None:
        save("initial", whole_weights(spectral_optimizers(optimizer)))

    def after(model: Any, optimizer: Any) -> None:
        found = spectral_optimizers(optimizer)
        save("final", whole_weights(found))
        save("retracted", retracted(found))
        save("momentum", momenta(optimizer))
        save("modes", {batch.mode for some in found for batch in some.batches})

    around_train(before, after)


def vectors() -> None:
    """Save the norm of every whole vector of the model after training."""

    def after(model: Any, optimizer: Any) -> None:
        from megatron.core import mpu

        norms = {}
        for name, param in model[0].named_parameters():
            if param.ndim == 1:
                square = param.detach().square().sum()
                if getattr(param, "tensor_model_parallel", False):
                    torch.distributed.all_reduce(square, group=mpu.get_tensor_model_parallel_group())
                norms[name] = square.sqrt().item()
        save("vectors", norms)

    around_train(None, after)


def momenta(built: Any) -> dict[str, torch.Tensor]:
    """Whole momentum of every logical matrix of this rank, by name, where there is one."""
    return {
        member.name: buffer.clone()
        for optimizer in spectral_optimizers(built)
        if "momentum_buffer" in optimizer.state_names
        for batch in optimizer.batches
        for member, buffer in zip(batch.members, whole_momenta(optimizer, batch), strict=True)
    }


def whole_momenta(optimizer: Any, batch: Any) -> torch.Tensor:
    return batch.whole(batch.read(optimizer.state[m.param]["momentum_buffer"] for m in batch.members))


def no_process_group() -> None:
    """Leave a mark if a process group is made."""
    original = torch.distributed.init_process_group

    def marked(*args: Any, **kwargs: Any) -> Any:
        Path("process_group_was_made").touch()
        return original(*args, **kwargs)

    torch.distributed.init_process_group = marked


class Collectives:
    """Counts the collectives that this process issues, by kind, and the bytes of their results."""

    KINDS = (
        *("all_gather_into_tensor", "all_to_all_single", "all_reduce", "broadcast", "all_gather"),
        *("all_gather_object", "broadcast_object_list", "all_to_all", "reduce", "reduce_scatter"),
        *("reduce_scatter_tensor", "gather", "scatter", "send", "recv", "isend", "irecv", "barrier"),
    )

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, int]]] = []

    def next_step(self) -> None:
        self.steps.append([])

    def __enter__(self) -> "Collectives":
        import torch.distributed as dist

        self._originals = {kind: getattr(dist, kind) for kind in self.KINDS}
        for kind, original in self._originals.items():
            setattr(dist, kind, self._counted(kind, original))
        return self

    def __exit__(self, *exc_info: object) -> None:
        import torch.distributed as dist

        for kind, original in self._originals.items():
            setattr(dist, kind, original)

    def _counted(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            if self.steps:
                result = args[0] if args and isinstance(args[0], torch.Tensor) else torch.empty(0)
                self.steps[-1].append((kind, result.numel() * result.element_size()))
            return original(*args, **kwargs)

        return collective


def count_collectives() -> None:
    """Save the collectives that each optimizer step issues, and their bytes."""
    from sso_megatron.optimizers.base import SpectralOptimizer

    step, counted = SpectralOptimizer.step, Collectives()

    def step_counted(self: Any, closure: Any = None) -> Any:
        with counted:
            counted.next_step()
            result = step(self, closure)
        save("collectives", counted.steps)
        return result

    SpectralOptimizer.step = step_counted
