"""Rules that find the logical matrices of a Megatron model's parameters by their global names."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sso_megatron.matrices.attention import Section, head_splits
from sso_megatron.matrices.layout import (
    ParameterLayout,
    Split,
    gate_up_splits,
    packed_splits,
    section_splits,
    whole,
)
from sso_megatron.mcore.compat import versions
from sso_megatron.mcore.parameters.names import ROUTED_EXPERT, global_names
from sso_megatron.optimizers.config import SpectralConfig

# Rules by the end of a name. A name that none of them fits is an error, so they match whole module names.
_QKV = re.compile(r"(^|\.)self_attention\.linear_qkv\.weight$")
_LATENT_Q = re.compile(r"(^|\.)self_attention\.linear_q(_up)?_proj\.weight$")
_LATENT_KV = re.compile(r"(^|\.)self_attention\.linear_kv_up_proj\.weight$")
_LATENT_DOWN = re.compile(r"(^|\.)self_attention\.linear_qkv_down_proj\.weight$")
_FC1 = re.compile(r"(^|\.)linear_fc1\.weight\d*$")
_WHOLE = re.compile(
    r"(^|\.)((linear_proj|router|eh_proj|linear_q_down_proj|linear_kv_down_proj|fc[12]_latent_proj)\.weight"
    r"|linear_fc2\.weight\d*|shared_experts\.gate_weight)$"
)
_RULES = (_QKV, _LATENT_Q, _LATENT_KV, _LATENT_DOWN, _FC1, _WHOLE)


@dataclass(frozen=True)
class ModelParameter:
    """A trainable parameter of the model, with its global name and how it is sharded.

    Attributes:
        name: global name, in which layer and expert numbers are those of the whole model.
        param: the model's parameter on this rank.
        config: the ``TransformerConfig`` of the module that it belongs to.
        partition_dim: dimension of its matrices that is sharded over ``tp_group``; None if they are whole.
        tp_group: tensor-parallel group; for expert parameters the experts' own.
        tp_size: number of ranks that share its matrices, 1 where they are whole.
        tp_rank: place of this rank among them.
        module: the module that has it as its own parameter; None in a model that is only described.
        is_expert: whether it belongs to routed experts, whose replicas have a group of their own.
        experts: global numbers of the experts that are packed into this one tensor, if any.
        glu_interleave: rows in a block where blocks of gate and up alternate, else 0.
    """

    name: str
    param: Tensor
    config: Any
    partition_dim: int | None
    tp_group: Any
    tp_size: int
    tp_rank: int
    module: Any = None
    is_expert: bool = False
    experts: tuple[int, ...] = ()
    glu_interleave: int = 0

    @property
    def is_vocabulary(self) -> bool:
        """Whether the parameter is an embedding, of tokens or other, or the output layer."""
        is_marked = getattr(self.param, "is_embedding_or_output_parameter", False)
        return is_marked or self.name.startswith("embedding.")

    @property
    def is_grouped(self) -> bool:
        """Whether the parameter is one expert's weight in a grouped product."""
        routed = ROUTED_EXPERT.search(self.name)
        return bool(routed and routed["gemm"])

    @property
    def is_matrix(self) -> bool:
        """Whether a spectral optimizer takes the parameter: a matrix, or experts' matrices in one tensor.

        The rule is Megatron's own (2-D), apart from learned position embeddings and the biases of experts
        in one tensor, which that would orthogonalise.
        """
        is_bias = re.search(r"\.bias\d*$", self.name)
        return (self.param.ndim == 2 or bool(self.experts)) and not (is_bias or self.is_vocabulary)

    @property
    def has_simple_shape(self) -> bool:
        """Whether the parameter is a vector or a vocabulary's matrix; spectral clipping takes them, too."""
        return self.param.ndim == 1 or (self.param.ndim == 2 and self.is_vocabulary)

    @property
    def is_gated(self) -> bool:
        """Whether the parameter is the first layer of a gated MLP, which holds gate and up."""
        return bool(_FC1.search(self.name) and self.config.gated_linear_unit)

    def unpacked(self) -> list["ModelParameter"]:
        """Return a view for each expert of a packed tensor, named as in a grouped product; else itself."""
        if not self.experts:
            return [self]
        blocks = self.param.detach().flatten(0, -2).chunk(len(self.experts))
        return [
            replace(self, name=f"{self.name}{expert}", param=block, experts=())
            for expert, block in zip(self.experts, blocks, strict=True)
        ]


def model_parameters(model_chunks: Iterable[Any], pg_collection: Any) -> Iterator[ModelParameter]:
    """Yield every trainable parameter of this rank's model chunks. No collective.

    Args:
        model_chunks: Megatron modules, wrapped or not.
        pg_collection: Megatron's ``ProcessGroupCollection``.
    """
    from megatron.core.utils import get_model_config, get_pg_rank, get_pg_size

    for chunk in model_chunks:
        num_experts = get_model_config(chunk).num_moe_experts
        experts: tuple[int, ...] = ()
        if num_experts:
            num_local = num_experts // get_pg_size(pg_collection.ep)
            first = get_pg_rank(pg_collection.ep) * num_local
            experts = tuple(range(first, first + num_local))
        rename = global_names(chunk, experts[0] if experts else 0)
        owner_of, modules = _enclosing_modules(chunk), dict(chunk.named_modules())
        for local_name, param in chunk.named_parameters():
            if not param.requires_grad:
                continue
            name, (owner, config) = rename(local_name), owner_of(local_name)
            routed = ROUTED_EXPERT.search(name)
            is_expert = routed or not getattr(param, "allreduce", True)
            tp_group = pg_collection.expt_tp if is_expert else pg_collection.tp
            dim = _partition_dim(param, routed)
            size = get_pg_size(tp_group) if dim is not None else 1
            yield ModelParameter(
                name,
                param,
                config,
                dim if size > 1 else None,
                tp_group,
                size,
                get_pg_rank(tp_group) if size > 1 else 0,
                modules[local_name.rpartition(".")[0]],
                bool(is_expert),
                experts if routed and not (routed["own"] or routed["gemm"]) else (),
                _glu_interleave(name, owner, config),
            )


def _enclosing_modules(chunk: Any) -> Callable[[str], tuple[Any, Any]]:
    """Return a function from a parameter's name to the module around its layer, and that module's config.

    Some modules of a model have configurations of their own: a vision encoder, or the layers of a
    heterogeneous model.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_model_config

    modules = dict(chunk.named_modules())
    of_chunk = get_model_config(chunk)

    def owner_of(name: str) -> tuple[Any, Any]:
        owner = modules[".".join(name.split(".")[:-2])]
        while name:
            name = name.rpartition(".")[0]
            config = getattr(modules[name], "config", None)
            if isinstance(config, TransformerConfig):
                return owner, config
        return owner, of_chunk

    return owner_of


def _partition_dim(param: Tensor, routed: re.Match[str] | None) -> int | None:
    """Return the dimension of a parameter's matrices that tensor parallelism shards, or None."""
    if routed:
        # Always sharded over the experts' group, in the dimension that the layer says: the attributes of
        # a parameter count the dimensions of a 3-D tensor in another way, or come from TransformerEngine,
        # which does not know of the shards when Megatron does the communication.
        return int(routed["fc"]) - 1
    dim = getattr(param, "partition_dim", -1)
    return dim if dim >= 0 and getattr(param, "tensor_model_parallel", False) else None


def _glu_interleave(name: str, owner: Any, config: Any) -> int:
    """Return the rows in a block where a gated MLP stores alternating blocks of gate and up, else 0.

    Only layers made for one fused kernel of TransformerEngine store them so.
    """
    if not _FC1.search(name) or not config.gated_linear_unit:
        return 0
    if re.search(r"(^|\.)experts\.linear_fc1\.", name):
        return config.moe_mlp_glu_interleave_size or 0
    if re.search(r"(^|\.)shared_experts\.", name):
        is_fused = not versions.is_0_18() and config.use_grouped_gemm_for_shared_expert
        return (config.moe_shared_expert_glu_interleave_size or 0) if is_fused else 0
    return 32 if type(owner).__name__ == "TEFusedMLPWithGroupedLinear" else 0


def layout_of(parameter: ModelParameter, shared: SpectralConfig) -> ParameterLayout:
    """Return the logical matrices of a parameter; a vector is one column.

    Raises:
        ValueError: no rule covers the parameter, or its splits do not fit this rank's shard.
    """
    if parameter.param.ndim == 1:
        # The vector of a layer whose columns are sharded is not sharded itself.
        dim = 0 if parameter.partition_dim == 0 else None
        column = whole((parameter.param.numel(), 1), dim, parameter.tp_size)
        return ParameterLayout(parameter.name, (column,), parameter.tp_group)
    splits = matrix_splits(parameter, tuple(parameter.param.shape), shared)
    return ParameterLayout(parameter.name, splits, parameter.tp_group)


def has_rule(p: ModelParameter) -> bool:
    """Return whether a rule says which matrices a parameter of this name holds."""
    return any(rule.search(p.name) for rule in _RULES)


def matrix_splits(p: ModelParameter, shape: tuple[int, ...], shared: SpectralConfig) -> tuple[Split, ...]:
    """Return the logical matrices of ``p`` stored with ``shape`` on this rank.

    Args:
        p: parameter, of which name, model configuration and sharding are read.
        shape: stored ``(rows, d_in)``, or ``(experts, rows, d_in)``.
        shared: configuration with the granularity of attention's projections and of gated MLPs.

    Raises:
        ValueError: see ``layout_of``.
    """
    try:
        return _matrix_splits(p, shape, shared)
    except ValueError as error:
        raise ValueError(f"{p.name} {tuple(shape)}: {error}") from None


def _matrix_splits(p: ModelParameter, shape: tuple[int, ...], shared: SpectralConfig) -> tuple[Split, ...]:
    if p.experts:
        one = (math.prod(shape[:-1]) // len(p.experts), shape[-1])
        splits = _matrix_splits(replace(p, experts=()), one, shared)
        return packed_splits(shape, splits, p.experts)
    if p.is_vocabulary:
        return (whole(shape, p.partition_dim, p.tp_size),)
    if not has_rule(p):
        raise ValueError(
            "no rule says which matrices this parameter holds; "
            f"--spectral-exclude '{re.escape(p.name)}' sends it to AdamW"
        )
    dim, size, granularity = p.partition_dim, p.tp_size, shared.qkv_split
    sections = _head_sections(p)
    if sections and granularity != "whole":
        return head_splits(
            shape, sections=sections, granularity=granularity, tp_size=size, tp_rank=p.tp_rank
        )
    if _LATENT_DOWN.search(p.name) and granularity != "whole":
        kv_rows = p.config.kv_lora_rank + p.config.qk_pos_emb_head_dim
        return section_splits(shape, [("q", p.config.q_lora_rank), ("kv", kv_rows)], dim, size)
    if p.is_gated and shared.mlp_split == "gate_up":
        return gate_up_splits(shape, dim, size, p.glu_interleave)
    return (whole(shape, dim, size),)


def _head_sections(p: ModelParameter) -> list[Section]:
    """Return the sections of each group of heads in an attention projection; empty for other parameters."""
    config = p.config
    if _QKV.search(p.name):
        per_group, rows = config.num_attention_heads // config.num_query_groups, config.kv_channels
        gate = [Section("gate", per_group, rows)] if config.attention_output_gate else []
        return [Section("q", per_group, rows), *gate, Section("k", 1, rows), Section("v", 1, rows)]
    if _LATENT_Q.search(p.name):
        return [Section("q", 1, config.qk_head_dim + config.qk_pos_emb_head_dim)]
    if _LATENT_KV.search(p.name):
        return [Section("k", 1, config.qk_head_dim), Section("v", 1, config.v_head_dim)]
    return []


class LayoutTable:
    """Finds the layout of a model parameter, or of its fp32 master copy.

    Megatron's mixed-precision optimizer puts master copies into the parameter groups after our
    optimizer is built, without our tags: they are found through ``main_param``.
    """

    def __init__(self, layouts: Sequence[tuple[Tensor, ParameterLayout]]) -> None:
        """Take pairs of model parameter and layout."""
        self._layouts = layouts
        self._by_id: dict[int, ParameterLayout] = {}

    def __call__(self, param: Tensor) -> ParameterLayout:
        """Return the layout of ``param``.

        Raises:
            KeyError: the parameter belongs to no matrix of this model.
        """
        if id(param) not in self._by_id:  # master copies appear later than the table
            for owner, layout in self._layouts:
                self._by_id[id(getattr(owner, "main_param", owner))] = layout
        if id(param) not in self._by_id:
            raise KeyError(f"a parameter of shape {tuple(param.shape)} is no matrix of this model")
        return self._by_id[id(param)]
