"""The configuration of a run, its model included, in the form that Megatron's training loop takes.

Megatron-Core 0.19 builds the model from that configuration. 0.18 takes a function that builds the model,
and has no configuration of a GPT model: there ``gpt_018`` provides one, and ``get_model`` is wrapped to
build the model from it.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from sso_megatron.mcore.compat import private_api, versions


def model_config(args: Namespace) -> Any:
    """Return the configuration of the GPT or hybrid model that Megatron's validated arguments describe."""
    from megatron.training import argument_utils

    if args.hybrid_layer_pattern:
        return argument_utils.hybrid_config_from_args(args)
    if not versions.is_0_18():
        return argument_utils.gpt_config_from_args(args)
    from sso_megatron.mcore.compat import gpt_018

    return gpt_018.config_from_args(args)


def configuration(args: Namespace) -> Any:
    """Return Megatron's configuration of a run, its model included."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    return pretrain_cfg_container_from_args(args, model_config(args))


def pretrain(container: Any, datasets: Callable[..., Any], forward_step: Any, **named: Any) -> None:
    """Run Megatron's training loop on the model that a configuration describes.

    Args:
        container: the run's configuration, which ``configuration`` returns.
        datasets: provider of train, validation and test sets.
        forward_step: function for the forward pass of one micro batch.
        **named: the loop's other arguments.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    pretrain(
        container,
        datasets,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **_model_provider("model_provider", container),
        **named,
    )


def model_and_optimizer(container: Any, groups: Any) -> tuple[list[Any], Any]:
    """Return model chunks and optimizer over given process groups, set up as in the training loop."""
    from megatron.core.enums import ModelType
    from megatron.training.training import setup_model_and_optimizer

    provider = _model_provider("model_provider_func", container)
    named = {} if provider else {"cfg_container": container, "pg_collection": groups}
    model, optimizer, _ = setup_model_and_optimizer(
        model_type=ModelType.encoder_or_decoder, **provider, **named
    )
    return model, optimizer


def _model_provider(name: str, container: Any) -> dict[str, Any]:
    """Return the model provider that 0.18 needs, by its name: the configuration, for our ``get_model``."""
    if not versions.is_0_18():
        return {}
    private_api.wrap("megatron.training.training:get_model", _by_configuration)
    return {name: container}


def _by_configuration(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap 0.18's ``get_model`` so that it takes a configuration instead of a function that builds."""

    def get_model(
        provider: Any,
        model_type: Any = None,
        wrap_with_ddp: bool = True,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.config import PretrainConfigContainer

        if not isinstance(provider, PretrainConfigContainer):
            return original(provider, model_type, wrap_with_ddp, config, pg_collection)
        return provider.model.get_builder_cls()(provider.model).build_distributed_models(
            pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
            ddp_config=provider.ddp,
            overlap_param_gather_with_optimizer_step=provider.optimizer.overlap_param_gather_with_optimizer_step,
            use_megatron_fsdp=provider.dist.use_megatron_fsdp,
            use_torch_fsdp2=provider.dist.use_torch_fsdp2,
            wrap_with_ddp=wrap_with_ddp,
            data_parallel_random_init=provider.rng.data_parallel_random_init,
        )

    return get_model
