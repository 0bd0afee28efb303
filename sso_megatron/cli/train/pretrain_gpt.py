"""Pretrains dense, MoE and hybrid GPT models with Megatron's own training loop.

The megatron-core wheel has the loop but no script; this is one, for mock and indexed data, with
evaluation and checkpoints as Megatron's flags ask for them.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sso_megatron.mcore import entry
from sso_megatron.mcore.compat import run_config

# Fields of a batch, without those of packed sequences: three inputs, then two that the loss needs.
_FIELDS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")

DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}
"""Values of Megatron's flags that the command line does not set."""


def main() -> None:
    """Train as the command line says."""
    entry.enter()
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=DEFAULTS)
    refuse_packed_data(args)
    # Every rank builds the data that it reads; Megatron asks the provider whether that is so.
    build_datasets.is_distributed = True  # type: ignore[attr-defined]
    run_config.pretrain(
        run_config.configuration(args),
        build_datasets,
        forward_step,
        get_embedding_ranks=partial(embedding_ranks, args),
    )
    torch.distributed.destroy_process_group()


def refuse_packed_data(args: Any) -> None:
    """End with one line and exit code 2 if the flags ask for data that this script cannot read."""
    for name in ("sft", "fim_data", "dataloader_inter_document_masking", "hybrid_context_parallel"):
        if getattr(args, name, False):
            from sso_megatron.mcore.errors import fail

            fail(
                f"--{name.replace('_', '-')}: this script trains on plain token streams; run "
                "Megatron-LM's own pretrain_gpt.py through python -m sso_megatron.run"
            )


def embedding_ranks(args: Any, pp_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that hold the word embeddings: first, last if tied, and MTP's."""
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training.arguments import core_transformer_config_from_args

    ranks = {pp_ranks[0], *get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args))}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)


def _reads_data(vp_stage: int | None) -> bool:
    """Return whether this pipeline stage needs tokens or labels."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    if is_first_or_last_pipeline_stage(vp_stage):
        return True
    config = core_transformer_config_from_args(get_args())
    return bool(
        mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def get_batch(data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """Return this rank's share of the next micro batch: ``_FIELDS`` by name, None where not needed.

    Collectives: broadcasts over the tensor-parallel group, whose first rank alone reads data.

    Args:
        data_iterator: yields dictionaries of ``(micro_batch, seq)`` tensors.
        vp_stage: virtual pipeline stage, or None.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args

    if not _reads_data(vp_stage):
        return dict.fromkeys(_FIELDS)
    args = get_args()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        read = next(data_iterator)
        batch = {name: read.get(name) for name in _FIELDS}
        batch = {k: v if v is None else v.cuda(non_blocking=True) for k, v in batch.items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        False,  # no packed sequences; the parameter's name differs between Megatron's versions
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=args.mtp_num_layers is not None and _reads_data(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {name: batch.get(name) for name in _FIELDS}


def forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
    """Return the model's output for one micro batch, and the function that computes the loss from it."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(**{("input_ids" if k == "tokens" else k): v for k, v in batch.items()})
    return output, partial(_loss, batch["loss_mask"])


def _loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum of the token losses, the number of tokens, and both as Megatron logs them.

    Args:
        loss_mask: ``(micro_batch, seq)``, 1 where a token counts.
        output: ``(micro_batch, seq)`` token losses.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejects, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"found {what} in the local forward loss",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build training, validation and test sets of the given sizes, on the ranks that read them."""
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    def builds_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and _reads_data(vp_stage)

    args = get_args()
    dataset_type = MockGPTDataset if args.mock_data else GPTDataset
    config = _dataset_config(args)
    return BlendedMegatronDatasetBuilder(dataset_type, num_samples, builds_here, config).build()


def _dataset_config(args: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
