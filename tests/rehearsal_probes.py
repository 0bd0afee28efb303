"""What ranks run in ``test_rehearsal.py``: a HybridModel script, and a look at parameters."""

from functools import partial
from typing import Any

import probes
import torch


def train_hybrid() -> None:
    """Our training script with Megatron's HybridModel and the specification that Megatron ships."""
    from sso_megatron.mcore import entry

    entry.enter()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from sso_megatron.cli import pretrain_gpt

    args = parse_and_validate_args()
    pretrain_gpt.build_datasets.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        pretrain_cfg_container_from_args(args, hybrid_config_from_args(args)),
        pretrain_gpt.build_datasets,
        ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        get_embedding_ranks=partial(pretrain_gpt._embedding_ranks, args),
    )
    torch.distributed.destroy_process_group()


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
