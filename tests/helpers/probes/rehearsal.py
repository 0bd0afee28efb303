"""What ranks run to begin alike, and to look at parameters."""

from typing import Any

from helpers import probes


def save_initial_checkpoint() -> None:
    """Save the model as iteration 1 of the folder ``initial``, then train as if nothing had been."""

    def save(model: Any, optimizer: Any) -> None:
        from megatron.training import get_args
        from megatron.training.checkpointing import save_checkpoint

        args = get_args()
        args.save = "initial"
        save_checkpoint(1, model, None, None, 0)
        args.save = None

    probes.around_train(save, None)


_MARKS = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


def parameters() -> None:
    """Save every parameter's local name, shape and marks."""

    def look(model: Any, optimizer: Any) -> None:
        found = {}
        for chunk in model:
            for name, param in chunk.named_parameters():
                marks = {mark: getattr(param, mark) for mark in _MARKS if hasattr(param, mark)}
                found[name.removeprefix("module.")] = (tuple(param.shape), marks)
        probes.save("parameters", found)

    probes.around_train(look, None)
