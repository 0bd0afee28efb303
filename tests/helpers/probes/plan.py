"""What a rank's real optimizers hold and do, for ``test_plan.py``; and the command itself."""

import hashlib
import resource
import sys
from collections import Counter
from typing import Any

import torch

from helpers.probes import around_train, retracted, save, spectral_optimizers, whole_weights


def plan_experiment() -> None:
    """A plan of the experiment that is this rank's first argument; the others are of both commands."""
    from sso_megatron.cli.experiments import fragments as experiments
    from sso_megatron.cli.experiments.command import render
    from sso_megatron.cli.main import make_parser

    name, *arguments = sys.argv[1:]
    flags = make_parser("plan").parse_known_args(["plan", *arguments])[1]
    own = arguments[: len(arguments) - len(flags)]
    words = [word for line in render(experiments.read(name), None, flags) for word in line]
    sys.argv = ["sso-megatron", *own, *words]
    plan()


def plan() -> None:
    """The command with this rank's arguments; says how much memory it took, in MiB, and what is left."""
    from sso_megatron.cli.main import main

    code = main(["plan", *sys.argv[1:]])
    save("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert not torch.distributed.is_initialized()
    sys.exit(code)


def watch() -> None:
    """Save this rank's place, parameters, matrices, radii, moves, bytes and flops after some real steps."""
    from sso_megatron.cli.bench.meters import Collectives, Flops
    from sso_megatron.optimizers.base import SpectralOptimizer

    step, flops, received, moves = SpectralOptimizer.step, {}, {}, {}

    def step_counted(self: Any, closure: Any = None) -> Any:
        if id(self) not in flops:  # the first step finds what later ones start from
            flops[id(self)] = 0
            return step(self, closure)
        on_spheres = {name: weight for name, (weight, _) in retracted([self]).items()}
        before = on_spheres or whole_weights([self])
        with Flops() as meter, Collectives() as moved:
            result = step(self, closure)
        flops[id(self)], received[id(self)] = meter.total, moved.received
        moves.update(_moves(self, before))
        return result

    SpectralOptimizer.step = step_counted

    def after(model: Any, optimizer: Any) -> None:
        save("place", _place())
        save("flops", sum(flops.values()))
        save("received", sum(received.values(), Counter()))
        save("moves", moves)
        save("parameters", _parameters(model, optimizer))
        save("matrices", _matrices(optimizer))
        save("bytes", _bytes(optimizer))

    around_train(None, after)


def _moves(optimizer: Any, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """Spectral norm of every matrix's step by the learning rate."""
    lr = optimizer.param_groups[0]["lr"]
    return {
        name: torch.linalg.matrix_norm((weight - before[name]).double(), 2).item() / lr
        for name, weight in whole_weights([optimizer]).items()
    }


def _place() -> dict[str, int]:
    from megatron.core import parallel_state as mpu

    return {
        "stage": mpu.get_pipeline_model_parallel_rank(),
        "tensor": mpu.get_tensor_model_parallel_rank(),
        "data": mpu.get_data_parallel_rank(with_context_parallel=True),
        "expert_tensor": mpu.get_expert_tensor_parallel_rank(),
        "expert_data": mpu.get_expert_data_parallel_rank(),
    }


def _parameters(model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
    """By global name: what is stored here, and whether a spectral optimizer of this rank steps on it.

    ``content`` is the same for all copies of what is stored: a matrix's by its values, a vector's, which
    may have the values of another, by its name.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from sso_megatron.mcore.parameters.layouts import model_parameters

    stepped = {
        id(param)
        for found in spectral_optimizers(optimizer)
        for group in found.param_groups
        for param in group["params"]
    }
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return {
        p.name: {
            "stored": tuple(p.param.shape),
            "steps": id(getattr(p.param, "main_param", p.param)) in stepped or id(p.param) in stepped,
            "is_expert": not getattr(p.param, "allreduce", True),
            "numel": p.param.numel(),
            "content": _digest(p.param) if p.param.ndim > 1 else p.name,
        }
        for p in model_parameters(model, groups)
    }


def _digest(param: torch.Tensor) -> str:
    return hashlib.sha256(param.detach().float().numpy().tobytes()).hexdigest()


def _matrices(optimizer: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for spectral in spectral_optimizers(optimizer):
        for batch in spectral.batches:
            here = {member.name: place for place, member in enumerate(batch.here)}
            radii = getattr(batch.cache, "radius", None)
            for member in batch.members:
                place = here.get(member.name)
                known = radii is not None and place is not None
                found[member.name] = {
                    "shape": tuple(member.split.shape),
                    "mode": batch.mode,
                    "works": place is not None,
                    "radius": radii[place].item() if known else None,
                }
    return found


def _bytes(optimizer: Any) -> dict[str, int]:
    """What is kept for the parameters, tensor by tensor; float32 copies where the model is in bfloat16."""
    from sso_megatron.mcore.optimizer.megatron_state import state_adapters
    from sso_megatron.optimizers.base import SpectralOptimizer

    kept = {"momentum": 0, "masters": 0, "adamw": 0}
    for part in state_adapters(optimizer):
        which = "momentum" if isinstance(part.inner, SpectralOptimizer) else "adamw"
        for param in (p for group in part.inner.param_groups for p in group["params"]):
            tensors = [
                t for t in part.inner.state[param].values() if isinstance(t, torch.Tensor) and t.ndim
            ]
            kept[which] += sum(t.untyped_storage().nbytes() for t in tensors)
            kept["masters"] += param.numel() * 4 * _is_mixed()
    return kept


def _is_mixed() -> bool:
    from megatron.training import get_args

    return bool(get_args().bf16)
