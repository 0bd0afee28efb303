"""Logical matrices of a Megatron model's parameters, by global name."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sso_megatron.matrices.layout import (
    ParameterLayout,
    Split,
    gate_up_splits,
    qkv_splits,
    whole,
)
from sso_megatron.optimizers.config import SpectralConfig

# Parameters that are one matrix each, by the end of their name.
_WHOLE = re.compile(r"(linear_proj|linear_fc2|router|eh_proj)\.weight$|shared_experts\.gate_weight$")
_QKV = re.compile(r"self_attention\.linear_qkv\.weight$")
_FC1 = re.compile(r"linear_fc1\.weight$")


@dataclass(frozen=True)
class ModelParameter:
    """A trainable parameter of the model with what its shard is part of.

    Attributes:
        name: global name: layer and expert numbers are those of the whole model.
        param: the model's parameter.
        config: the ``TransformerConfig`` of its model chunk.
        partition_dim: dimension that is cut over ``tp_group``, or None.
        tp_group: tensor-parallel group, that of the experts for expert parameters.
        tp_size: its ranks.
        tp_rank: this rank's place in it.
    """

    name: str
    param: torch.nn.Parameter
    config: Any
    partition_dim: int | None
    tp_group: Any
    tp_size: int
    tp_rank: int

    @property
    def is_matrix(self) -> bool:
        """Whether a spectral optimizer takes it: 2-D, no embedding of any kind, no output layer.

        Megatron's own rule, which would orthogonalise learned position embeddings, less those.
        """
        is_vocabulary = getattr(self.param, "is_embedding_or_output_parameter", False)
        is_embedding = is_vocabulary or self.name.startswith("embedding.")
        return self.param.ndim == 2 and not is_embedding

    @property
    def is_gated(self) -> bool:
        """Whether it is the first layer of a gated MLP, gate and up in one."""
        return bool(_FC1.search(self.name) and self.config.gated_linear_unit)


def model_parameters(model_chunks: Iterable[Any], pg_collection: Any) -> Iterator[ModelParameter]:
    """Every trainable parameter of this rank's model chunks. No collective.

    Args:
        model_chunks: Megatron modules, wrapped or not.
        pg_collection: Megatron's ``ProcessGroupCollection``.
    """
    from megatron.core.utils import get_model_config, get_pg_rank, get_pg_size

    for chunk in model_chunks:
        config = get_model_config(chunk)
        rename = _global_numbers(chunk, config, pg_collection)
        for local_name, param in chunk.named_parameters():
            if not param.requires_grad:
                continue
            name = rename(local_name)
            is_expert = not getattr(param, "allreduce", True)
            tp_group = pg_collection.expt_tp if is_expert else pg_collection.tp
            size = get_pg_size(tp_group)
            dim = getattr(param, "partition_dim", -1)
            is_cut = size > 1 and dim >= 0 and getattr(param, "tensor_model_parallel", False)
            yield ModelParameter(
                name,
                param,
                config,
                dim if is_cut else None,
                tp_group,
                size if is_cut else 1,
                get_pg_rank(tp_group) if is_cut else 0,
            )


def _global_numbers(chunk: Any, config: Any, pg_collection: Any) -> Any:
    """A function from a chunk's parameter names to global ones.

    Pipeline stages number their layers from 0 and expert-parallel ranks their experts; Megatron
    keeps the global layer number on each layer.
    """
    from megatron.core.utils import get_pg_rank, get_pg_size

    layers = {
        name: f"{name.rpartition('.')[0]}.{module.layer_number - 1}"
        for name, module in chunk.named_modules()
        if re.search(r"layers\.\d+$", name) and hasattr(module, "layer_number")
    }
    first_expert = 0
    if config.num_moe_experts:
        ep_group = pg_collection.ep
        first_expert = get_pg_rank(ep_group) * (config.num_moe_experts // get_pg_size(ep_group))

    def rename(name: str) -> str:
        layer = re.match(r"(.*?layers\.\d+)(\..*)", name)
        if layer and layer[1] in layers:
            name = layers[layer[1]] + layer[2]
        name = re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + first_expert}", name)
        return re.sub(r"^(module\.)+", "", name)  # wrappers: DDP, Float16Module

    return rename


def layout_of(parameter: ModelParameter, shared: SpectralConfig) -> ParameterLayout:
    """The logical matrices of a matrix parameter.

    Raises:
        ValueError: no rule covers the parameter, or its splits do not fit this rank's shard.
    """
    splits = matrix_splits(parameter, tuple(parameter.param.shape), shared)
    return ParameterLayout(parameter.name, splits, parameter.tp_group)


def matrix_splits(
    parameter: ModelParameter, shape: tuple[int, ...], shared: SpectralConfig
) -> tuple[Split, ...]:
    """Logical matrices of ``parameter`` stored with ``shape`` on this rank.

    Args:
        parameter: gives name, model configuration and placement.
        shape: stored ``(rows, d_in)``.
        shared: granularity of QKV and of gated MLPs.

    Raises:
        ValueError: see ``layout_of``.
    """
    name, config = parameter.name, parameter.config
    dim, size = parameter.partition_dim, parameter.tp_size
    try:
        if _QKV.search(name) and shared.qkv_split != "whole":
            per_group = config.num_attention_heads // config.num_query_groups
            gate = [("gate", per_group)] if getattr(config, "attention_output_gate", False) else []
            return qkv_splits(
                shape,
                sections=[("q", per_group), *gate, ("k", 1), ("v", 1)],
                head_dim=config.kv_channels,
                granularity=shared.qkv_split,
                tp_size=size,
                tp_rank=parameter.tp_rank,
            )
        if parameter.is_gated and shared.mlp_split == "gate_up":
            return gate_up_splits(shape, dim, size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if _QKV.search(name) or _FC1.search(name) or _WHOLE.search(name):
        return (whole(shape, dim, size),)
    raise ValueError(
        f"{name} {shape}: no rule says which matrices this parameter holds; "
        f"--spectral-exclude '{re.escape(name)}' sends it to AdamW"
    )


class LayoutTable:
    """Layout of a model parameter, or of its fp32 master copy.

    Megatron's mixed-precision optimizer puts master copies into the parameter groups after our
    optimizer is built, and our tags do not reach them: they are found through ``main_param``.
    """

    def __init__(self, layouts: Sequence[tuple[Tensor, ParameterLayout]]) -> None:
        """Take pairs of model parameter and layout."""
        self._layouts = layouts
        self._by_id: dict[int, ParameterLayout] = {}

    def __call__(self, param: Tensor) -> ParameterLayout:
        """The layout of ``param``.

        Raises:
            KeyError: the parameter belongs to no matrix of this model.
        """
        if id(param) not in self._by_id:  # master copies appear later than the table
            for owner, layout in self._layouts:
                self._by_id[id(getattr(owner, "main_param", owner))] = layout
        if id(param) not in self._by_id:
            raise KeyError(f"a parameter of shape {tuple(param.shape)} is no matrix of this model")
        return self._by_id[id(param)]
