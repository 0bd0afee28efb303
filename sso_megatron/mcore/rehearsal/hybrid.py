"""Megatron's HybridModel on the CPU, with layers of attention, MLPs and experts from local modules.

The specification that Megatron ships is made of TransformerEngine's modules. Here they are replaced by
those of the local GPT specification, in place, so that every script that uses the specification gets them.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from sso_megatron.mcore.compat import private_api, versions


def accept_hybrid_model(pattern: str, qk_layernorm: bool) -> None:
    """Make it possible to build ``HybridModel`` without TransformerEngine.

    Args:
        pattern: the value of ``--hybrid-layer-pattern``, with one symbol for each layer.
        qk_layernorm: whether latent attention normalises its compressed queries, keys and values.
            Other attention of a hybrid model never normalises them.

    Raises:
        ValueError: the pattern has a layer that only a GPU can run.
    """
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    found = gpu_layer(pattern)
    if found is not None:
        symbol, name = found
        raise ValueError(
            f"--hybrid-layer-pattern {pattern} cannot be rehearsed on the CPU: {symbol} is a {name} "
            "layer, which needs kernels for GPUs. Either rehearse with another layer in its place "
            f"({Symbols.ATTENTION} attention, {Symbols.MLP} MLP, {Symbols.MOE} experts), or run on a "
            "machine with a CUDA device."
        )
    _refill(qk_layernorm)


def gpu_layer(pattern: str) -> tuple[str, str] | None:
    """Return symbol and name of a layer in a pattern that needs kernels for GPUs; None if there is none."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    needing = (
        (Symbols.MAMBA, "Mamba"),
        (Symbols.GDN, "gated delta net"),
        (Symbols.DS_ATTENTION, "sparse attention"),
    )
    return next((found for found in needing if found[0] in pattern), None)


@functools.cache
def _refill(qk_layernorm: bool) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # The norm follows the model's configuration, whatever name is given here.
    gpt = functools.partial(get_gpt_layer_local_submodules, normalization="RMSNorm")
    layers = hybrid_stack_spec.submodules
    layers.attention_layer.submodules = _attention_of(gpt())
    latent = gpt(multi_latent_attention=True, qk_layernorm=qk_layernorm)
    if not versions.is_0_18():  # 0.18 has no such layers
        layers.mla_layer.submodules = _attention_of(latent)
    layers.mlp_layer.submodules = _mlp_of(gpt())
    # Always grouped, as with TransformerEngine; the number of experts only selects such a layer.
    layers.moe_layer.submodules = _mlp_of(gpt(num_experts=1, moe_grouped_gemm=True))
    for layer in layers.mtp_block_spec.submodules.layer_specs:
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = WrappedTorchNorm
        layer.submodules.eh_proj = ColumnParallelLinear
    # The last norm is not in the specification.
    private_api.replace("megatron.core.models.hybrid.hybrid_block:TENorm", WrappedTorchNorm)


def _attention_of(layer: Any) -> Any:
    """Return a copy of a transformer layer's submodules with the attention alone."""
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    half = copy.copy(layer)
    half.pre_mlp_layernorm = half.mlp = IdentityOp
    half.mlp_bda = IdentityFuncOp
    return half


def _mlp_of(layer: Any) -> Any:
    """Return a copy of a transformer layer's submodules with the MLP or experts alone."""
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    half = copy.copy(layer)
    half.input_layernorm = half.self_attention = IdentityOp
    half.self_attn_bda = IdentityFuncOp
    return half
