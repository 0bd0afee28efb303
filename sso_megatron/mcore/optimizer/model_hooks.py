"""Hooks where Megatron's training loop builds a model, and its optimizer's settings for muP."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.optimizer.registration import is_spectral, prepare_for_shards


def install() -> None:
    """Install hooks that route parameters by our rule before DDP wraps a model, and keep muP off ours.

    Runs with other optimizers are not changed.

    Raises:
        UnsupportedError: this Megatron-Core lacks one of the hooked functions.
    """
    private_api.wrap("megatron.training.training:tag_params_for_buffer_routing", _tagged_by_us)
    private_api.wrap("megatron.training.models.dist_utils:_ddp_wrap", _with_shards)
    for module in ("megatron.core.optimizer", "megatron.training.training"):
        private_api.wrap(f"{module}:get_mup_config_overrides", _for_adamw_alone)


def _is_sharded() -> bool:
    from megatron.training import get_args

    args = get_args()
    return args.optimizer in OPTIMIZERS and args.use_layer_wise_distributed_optimizer


def _tagged_by_us(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the tagging in ``training.get_model``, which is used where a script passes a model provider."""

    def tag_params_for_buffer_routing(model_chunks: list[Any]) -> None:
        if not _is_sharded():
            original(model_chunks)
            return
        from megatron.core.process_groups_config import ProcessGroupCollection

        prepare_for_shards(model_chunks, ProcessGroupCollection.use_mpu_process_groups())

    return tag_params_for_buffer_routing


def _with_shards(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the DDP wrapping of models that a configuration describes, as in Megatron's own scripts.

    Megatron's function (0.19, ``training/models/dist_utils.py``) does not know the layer-wise optimizer:
    DDP would all-reduce gradients, and each rank would keep a copy of all parameters outside of any buffer.
    """

    def ddp_wrap(
        model: list[Any],
        data_parallel_random_init: bool,
        ddp_config: Any,
        *args: Any,
        pg_collection: Any,
        **kwargs: Any,
    ) -> Any:
        if _is_sharded():
            prepare_for_shards(model, pg_collection)
            ddp_config = dataclasses.replace(ddp_config, use_distributed_optimizer=True)
        return original(
            model, data_parallel_random_init, ddp_config, *args, pg_collection=pg_collection, **kwargs
        )

    return ddp_wrap


def _for_adamw_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap muP's learning rates and epsilons: AdamW's parameters get those of ``--optimizer adam``.

    Spectral parameters scale with the width through their radii already. Megatron goes by the
    optimizer's name: ``sso`` would count as neither Adam nor Muon, and ``muon_sphere`` as Muon.
    """

    def get_mup_config_overrides(config: Any, mup_width_mult: float, optimizer_type: str = "adam") -> Any:
        if optimizer_type not in OPTIMIZERS:
            return original(config, mup_width_mult, optimizer_type)
        overrides = original(config, mup_width_mult, "adam")
        return {_unless_spectral(key): override for key, override in overrides.items()}

    return get_mup_config_overrides


def _unless_spectral(key: Any) -> Any:
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    # Equal names make equal keys.
    return ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name=f"not_spectral: {key}",
            fn=lambda param, name: not is_spectral(param) and key.matches(param, name),
        )
    )
