"""GPT models by configuration for Megatron-Core 0.18, which has configurations of hybrid models alone.

This module imports Megatron, so it may only be imported when a model is described.
"""

from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from megatron.core.pipeline_parallel import utils as stages
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models import HybridModelBuilder, HybridModelConfig


@dataclass(kw_only=True)
class GPTConfig(HybridModelConfig):
    """Describes a GPT model by the fields of a hybrid model's configuration and one for rotary positions.

    Attributes:
        rope_scaling: whether rotary positions are stretched, as ``--use-rope-scaling`` asks.
    """

    builder: ClassVar[str] = f"{__name__}.GPTBuilder"
    rope_scaling: bool = False


def config_from_args(args: Namespace) -> GPTConfig:
    """Return the configuration of the GPT model that Megatron's validated arguments describe."""
    known = hybrid_config_from_args(args)
    values = {f.name: getattr(known, f.name) for f in fields(known)}
    return GPTConfig(**values, rope_scaling=args.use_rope_scaling)


class GPTBuilder(HybridModelBuilder):
    """Builds GPT models; everything but ``build_model`` is inherited from the hybrid builder."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one chunk of the model.

        Args:
            pg_collection: Megatron's process groups.
            pre_process: whether the chunk has the embedding; None to decide by the pipeline stage.
            post_process: whether it has the output layer; None to decide by the pipeline stage.
            vp_stage: virtual pipeline stage.
        """
        model, config = self._model_config, self._model_config.transformer
        virtual = {"vp_stage": vp_stage, "vp_size": config.virtual_pipeline_model_parallel_size}
        if pre_process is None:
            pre_process = stages.is_vp_first_stage(**virtual) and stages.is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = stages.is_vp_last_stage(**virtual) and stages.is_pp_last_stage(pg_collection.pp)
        return GPTModel(
            config=config,
            transformer_layer_spec=model.hybrid_stack_spec or _layers(config, vp_stage),
            mtp_block_spec=_predicted_tokens(config, vp_stage),
            vocab_size=model.vocab_size,
            max_sequence_length=model.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=model.fp16_lm_cross_entropy,
            parallel_output=model.parallel_output,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            rope_scaling=model.rope_scaling,
            seq_len_interpolation_factor=model.seq_len_interpolation_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )


def _kind(config: Any) -> dict[str, Any]:
    """Return the arguments that select one of Megatron's implementations of a layer."""
    return {
        "use_transformer_engine": config.transformer_impl == "transformer_engine",
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }


def _layers(config: Any, vp_stage: int | None) -> Any:
    """Return the layers of a chunk; Megatron's decoder block is dense where there are no experts."""
    if config.experimental_attention_variant is not None:
        return get_transformer_block_with_experimental_attention_variant_spec(
            config=config, vp_stage=vp_stage
        )
    if isinstance(config, HeterogeneousTransformerConfig):
        return get_gpt_heterogeneous_layer_spec(config, _kind(config)["use_transformer_engine"])
    return specs.get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **_kind(config))


def _predicted_tokens(config: Any, vp_stage: int | None) -> Any:
    """Return the layers of multi-token prediction, built like the decoder's last layer; None if unused."""
    if config.mtp_num_layers is None:
        return None
    layer = specs.get_gpt_decoder_layer_specs(config, vp_stage=vp_stage, **_kind(config))[-1]
    return specs.get_gpt_mtp_block_spec(
        config, layer, use_transformer_engine=_kind(config)["use_transformer_engine"], vp_stage=vp_stage
    )
