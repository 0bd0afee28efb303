"""A user's own training loop over Megatron's DDP, without its command line; told by one JSON argument."""

import json
import os
import sys
from typing import Any

import torch

from helpers.probes import save


def train() -> None:
    """Five steps; saves losses, the weights after them, and what the optimizer is.

    ``ddp`` are settings of DDP, ``optimizer`` those of the optimizer, ``prepares`` whether the script calls
    ``prepare_for_shards``.
    """
    task = json.loads(sys.argv[1])
    from sso_megatron import SSOConfig
    from sso_megatron.mcore import prepare_for_shards, register

    register(SSOConfig(radius_scaler=2.0))

    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,  # a bias of the keys has no gradient but rounding
        use_cpu_initialization=True,
        bf16=task["bf16"],
    )
    spec = get_gpt_layer_local_spec()
    model: Any = GPTModel(
        config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope"
    )
    if task["bf16"]:
        model.bfloat16()
    if task["prepares"]:
        prepare_for_shards([model], ProcessGroupCollection.use_mpu_process_groups())
    model = DistributedDataParallel(config, DistributedDataParallelConfig(**task["ddp"]), model)
    settings = OptimizerConfig(
        optimizer="sso", lr=5e-3, weight_decay=0.1, bf16=task["bf16"], **task["optimizer"]
    )
    optimizer = get_megatron_optimizer(settings, [model])

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(16).expand(2, -1)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    losses = []
    for _ in range(5):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        mine = batches.chunk(size)[rank]
        for number, tokens in enumerate(mine):
            model.is_last_microbatch = number == len(mine) - 1
            loss = model(tokens, positions, mask, labels=tokens).mean() / len(mine)
            loss.backward()
            losses.append(loss.item() * len(mine))
        model.finish_grad_sync()
        optimizer.step()
    if task["ddp"].get("overlap_param_gather"):
        model.start_param_sync(force_sync=True)
    save("losses", losses)
    save("final", {name: p.detach().float().clone() for name, p in model.named_parameters()})
