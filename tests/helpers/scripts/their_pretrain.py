"""A user's training script: Megatron's API, a model provider of its own, and not a word of ours."""

from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def datasets(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="98,1,1",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


def loss_func(mask, output):
    loss = (output.float() * mask).sum()
    count = mask.sum().to(torch.int)
    return loss, count, {"lm loss": torch.cat([loss.detach().view(1), count.view(1)])}


def forward_step(iterator, model):
    batch = {key: value.cuda() for key, value in next(iterator).items() if torch.is_tensor(value)}
    names = ("tokens", "position_ids", "attention_mask", "labels")
    tokens, positions, mask, labels = (batch.get(name) for name in names)
    return model(tokens, positions, mask, labels=labels), partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    datasets.is_distributed = True
    parsed = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(parsed)
    pretrain(  # by name: the order differs between versions
        container,
        datasets,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=model_provider,
    )
