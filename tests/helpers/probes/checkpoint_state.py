"""Functions that a rank runs beside training, to look at everything that a checkpoint must keep."""

import functools
import io
import itertools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from helpers.probes import around_train, save, spectral_optimizers


def everything(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, masters, moments, counters and what is kept of each matrix, on this rank."""
    found: dict[str, Any] = {"weights": {}, "held": {}, "spectral": {}, "ours": {}}
    for index, chunk in enumerate(model):
        for name, value in chunk.state_dict().items():
            if isinstance(value, torch.Tensor):
                found["weights"][f"{index}.{name}"] = value.clone()
    for i, inner in enumerate(_inner(optimizer)):
        for j, group in enumerate(inner.param_groups):
            for k, param in enumerate(group["params"]):
                key = f"{i}.{j}.{k}"
                found["held"][key] = param.detach().clone()
                for name, value in inner.state[param].items():
                    found["held"][f"{key}.{name}"] = value.clone()
            settings = {k: v for k, v in group.items() if k != "params"}
            if "step" in settings:  # a number until the next step
                settings["step"] = int(settings["step"])
            found["held"][f"{i}.{j}"] = settings
    for spectral in spectral_optimizers(optimizer):
        found["spectral"] |= spectral.spectral_state()
        found["ours"] |= {name: True for kept in spectral.state.values() for name in kept}
    return found


def _inner(optimizer: Any) -> list[Any]:
    if hasattr(optimizer, "chained_optimizers"):
        return [inner for part in optimizer.chained_optimizers for inner in _inner(part)]
    return [optimizer.optimizer]


def state() -> None:
    """Save all of it as it is before training, at each of Megatron's saves and after training."""
    from megatron.training import training

    original = training.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        save(f"at{iteration}-", everything(model, optimizer))
        return original(iteration, model, optimizer, *args, **kwargs)

    training.save_checkpoint = save_checkpoint
    around_train(
        lambda model, optimizer: save("loaded", everything(model, optimizer)),
        lambda model, optimizer: save("state", everything(model, optimizer)),
    )


def saved_again() -> None:
    """Save what was loaded, before anything is done with it, into ``again``."""

    def save_again(model: Any, optimizer: Any) -> None:
        from megatron.core import dist_checkpointing, mpu
        from megatron.core.utils import unwrap_model

        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        chunks = unwrap_model(model)
        names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
        state = {
            name: chunk.sharded_state_dict(metadata=metadata)
            for name, chunk in zip(names, chunks, strict=True)
        }
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
        Path("again").mkdir(exist_ok=True)
        dist_checkpointing.save(state, "again")

    around_train(save_again, None)


def contents(folder: Path) -> dict[str, Any]:
    """Every tensor of a distributed checkpoint, whole, and every matrix's object, by key."""
    reader = FileSystemReader(folder)
    found: dict[str, Any] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            found[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        elif key.startswith("optimizer.spectral."):
            found[key] = io.BytesIO()
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    # Megatron puts an object into a list.
    return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}


def poison() -> None:
    """Spoil one element of the last rank's gradient at the third step, and save all before and after it.

    ``POISON`` says how: ``nan`` or ``inf``, of the first parameter with this word in its name; ``late``:
    when gradients have been reduced already, on this rank alone.
    """
    value, where, *late = os.environ["POISON"].split()
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def start(model: Any, optimizer: Any) -> None:
        step, count = optimizer.step, itertools.count(1)
        state = {"iteration": next(count)}

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if state["iteration"] == 3:
                gradient = gradient.clone()
                gradient.view(-1)[0] = float(value)
            return gradient

        def watched() -> Any:
            if state["iteration"] == 3:
                save("before", everything(model, optimizer))
                if is_last and late:
                    param.main_grad.view(-1)[0] = float(value)
            result = step()
            if state["iteration"] == 3:
                save("after", everything(model, optimizer))
                save("success", result[0])
            state["iteration"] = next(count)
            return result

        optimizer.step = watched
        named = (item for chunk in model for item in chunk.named_parameters())
        param = next(p for name, p in named if "layers" in name and where in name)
        if is_last and not late:
            param.register_hook(spoil)

    around_train(start, None)
