"""Every private name of Megatron's that this package relies on, in one table.

A name counts as private if it begins with an underscore, or if this package replaces what it refers to. For
a new version of Megatron, this table is what to check, not the rest of the package; a test looks every name
up in every supported version.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A name of Megatron's that it does not promise to keep.

    Attributes:
        use: what this package does with it, and where.
        only: the one minor version in which it is used; None if it is used in all supported versions.
    """

    use: str
    only: str | None = None


OPTIMIZER, _TRAINING = "megatron.core.optimizer", "megatron.training.training"
_ARGUMENTS, CHECKPOINTING = "megatron.training.arguments", "megatron.training.checkpointing"
LOADER = "megatron.core.dist_checkpointing.strategies.torch:TorchDistLoadShardedStrategy"
_GRAD_NORM = "megatron.core.optimizer.optimizer:MegatronOptimizer"
_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
_LATENT = "megatron.core.transformer.multi_latent_attention"

PRIVATE_NAMES: dict[str, PrivateName] = {
    # Flags: entry
    f"{_ARGUMENTS}:add_megatron_arguments": PrivateName("wrapped: adds our flags"),
    f"{_ARGUMENTS}:validate_args": PrivateName("wrapped: our checks come first"),
    # Optimizers: optimizer/registration, model_hooks, layer_wise, chain
    f"{OPTIMIZER}.emerging_optimizers:_EMERGING_OPTIMIZERS": PrivateName("gets our optimizers"),
    f"{OPTIMIZER}:_get_megatron_emerging_optimizer": PrivateName("wrapped: builds our chain"),
    f"{OPTIMIZER}:_get_param_groups": PrivateName("called: parameter groups of the sharded optimizer"),
    f"{OPTIMIZER}:_get_megatron_optimizer_based_on_param_groups": PrivateName(
        "called: AdamW of the sharded optimizer"
    ),
    f"{OPTIMIZER}.layer_wise_optimizer:LayerWiseDistributedOptimizer._compute_per_buffer_param_layout": (
        PrivateName("wrapped: lays whole matrices out where Megatron's loop computes buffers")
    ),
    f"{OPTIMIZER}.distrib_optimizer:DistributedOptimizer._compute_per_buffer_param_layout": PrivateName(
        "wrapped: lays whole matrices out where model builders and DDP compute buffers"
    ),
    f"{OPTIMIZER}.optimizer:ChainedOptimizer._synchronize_steps": PrivateName(
        "overridden: counters that are tensors"
    ),
    f"{_GRAD_NORM}.get_main_grads_for_grad_norm": PrivateName("wrapped on instances", only="0.18"),
    f"{_GRAD_NORM}.get_grads_for_grad_norm": PrivateName("wrapped on instances", only="0.19"),
    f"{OPTIMIZER}:get_mup_config_overrides": PrivateName("wrapped: keeps muP off spectral parameters"),
    f"{_TRAINING}:get_mup_config_overrides": PrivateName("the same, by the name that the loop calls"),
    f"{_TRAINING}:tag_params_for_buffer_routing": PrivateName("wrapped: routes parameters by our rule"),
    "megatron.training.models.dist_utils:_ddp_wrap": PrivateName("wrapped: the same for model builders"),
    # Models: compat/run_config
    f"{_TRAINING}:get_model": PrivateName("wrapped: builds GPT models from a configuration", only="0.18"),
    # Records: metrics/loop_hooks
    f"{_TRAINING}:setup_model_and_optimizer": PrivateName("wrapped: all ranks end together"),
    f"{_TRAINING}:pretrain": PrivateName("wrapped: keeps records"),
    "megatron.training:pretrain": PrivateName(
        "replaced by the wrapped one, by the name that scripts import"
    ),
    f"{_TRAINING}:train": PrivateName("wrapped: time, optimizer, run.json"),
    f"{_TRAINING}:train_step": PrivateName("wrapped: measures the step"),
    f"{_TRAINING}:training_log": PrivateName("wrapped: losses of every iteration"),
    f"{_TRAINING}:evaluate": PrivateName("wrapped: the validation loss"),
    f"{_TRAINING}:evaluate_and_print_results": PrivateName("wrapped: tells validation from test"),
    f"{_TRAINING}:checkpoint_and_decide_exit": PrivateName("wrapped: ends an unhealthy run"),
    # Checkpoints: checkpoint/save_hooks, load_hooks, compatibility
    "megatron.core.dist_checkpointing:save": PrivateName("wrapped: into a partial folder"),
    f"{CHECKPOINTING}:open_file": PrivateName("wrapped: replaces the tracker", only="0.18"),
    "megatron.core.msc_utils:maybe_msc.open": PrivateName("wrapped: replaces the tracker", only="0.19"),
    f"{CHECKPOINTING}:load_checkpoint": PrivateName("wrapped: all ranks end together"),
    f"{_TRAINING}:load_checkpoint": PrivateName("replaced by the wrapped one, by the name the loop calls"),
    f"{CHECKPOINTING}:checkpoint_exists": PrivateName("wrapped: repairs the folder first"),
    f"{CHECKPOINTING}:_load_base_checkpoint": PrivateName("wrapped: repairs the folder first"),
    f"{CHECKPOINTING}:_get_checkpoint_format": PrivateName("wrapped: checks the files first"),
    f"{CHECKPOINTING}:_load_global_dist_base_checkpoint": PrivateName("wrapped: checks that it fits"),
    "megatron.core.dist_checkpointing.serialization:verify_integrity_manifest": PrivateName(
        "wrapped: hashes no file twice"
    ),
    "megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader": PrivateName(
        "called: a checkpoint's metadata"
    ),
    f"{LOADER}.load_tensors_metadata": PrivateName("wrapped: torch.empty does not take all that it gives"),
    # Plans: plan/fake_world
    "megatron.training.initialize:_initialize_distributed": PrivateName("called: fake process groups"),
    # Without a GPU: rehearsal; data set helpers: compat/compiled_helpers
    "megatron.training.initialize:_warmup_jit_function": PrivateName("replaced: nothing is compiled"),
    "megatron.core.datasets.utils:compile_helpers": PrivateName("replaced: a wheel has them compiled"),
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": PrivateName(
        "wrapped: accepts sequence parallelism"
    ),
    f"{_ATTENTION}.__init__": PrivateName("wrapped: widths of latent attention, context parallelism"),
    f"{_ATTENTION}.forward": PrivateName("wrapped: context parallelism"),
    f"{_LATENT}:MLASelfAttention.__init__": PrivateName("wrapped: whole down-projections"),
    f"{_LATENT}:TELinear": PrivateName("replaced: a linear layer that every rank holds whole"),
    "megatron.core.models.backends:LocalSpecProvider.grouped_mlp_modules": PrivateName(
        "wrapped: grouped experts"
    ),
    "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec": PrivateName(
        "changed in place: layers that a CPU can run"
    ),
    "megatron.core.models.hybrid.hybrid_block:TENorm": PrivateName("replaced: torch's norm"),
}
"""The private names that are used, by ``module:name`` or ``module:Class.name``."""
