"""Grouped experts on the CPU: Megatron's own module, with linear layers that loop over the experts.

On a GPU the linear layers of ``TEGroupedMLP`` are TransformerEngine's, which multiply all experts
in one kernel. The layers here hold the same parameters under the same names (``weight0``,
``weight1``, ...) with the same attributes, so that optimizers and checkpoints work as on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sso_megatron.mcore.compat import private_api


class _GroupedLinear(torch.nn.Module):
    """Applies a linear layer for each expert of this rank.

    Nothing is communicated: Megatron's dispatcher sends every rank the tokens that its experts
    need, and sums the results over the ranks that share an expert.
    """

    cut_dim: int  # dimension of a weight that expert tensor parallelism shards

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **kwargs: Any,
    ) -> None:
        """Make the layers from Megatron's arguments.

        Args:
            num_gemms: number of experts on this rank.
            input_size: width of a token, over all ranks that share an expert.
            output_size: width of a result, over all ranks that share an expert.
            config: the model's ``TransformerConfig``.
            init_method: fills a whole weight.
            bias: whether each expert has a bias.
            skip_bias_add: whether ``forward`` returns the biases instead of adding them.
            pg_collection: Megatron's ``ProcessGroupCollection``.
            kwargs: options of kernels, and names; ignored.
        """
        super().__init__()
        self.num_gemms = num_gemms
        self.skip_bias_add = skip_bias_add
        self.use_bias = bias
        self.groups = pg_collection
        tp_size = pg_collection.expt_tp.size()
        self.shape = [output_size, input_size]
        self.shape[self.cut_dim] //= tp_size  # Megatron has checked that this divides
        # Whether the gradients are summed over the experts' own data-parallel group.
        is_apart = config.expert_model_parallel_size > 1
        is_apart |= config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype))
            _mark(weight, self.cut_dim, is_apart)
            self.register_parameter(f"weight{i}", weight)
            if bias:
                zeros = torch.zeros(self.shape[0], dtype=config.params_dtype)
                self.register_parameter(f"bias{i}", torch.nn.Parameter(zeros))
                _mark(self.get_parameter(f"bias{i}"), 0 if self.cut_dim == 0 else None, is_apart)
        self.register_load_state_dict_pre_hook(self._drop_extra_states)
        if config.perform_initialization:
            # A gated layer holds gate and up, each of which is sharded.
            stride = 2 if config.gated_linear_unit and self.cut_dim == 0 else 1
            self._draw((output_size, input_size), stride, init_method)

    @torch.no_grad()
    def _draw(self, whole: tuple[int, int], stride: int, init_method: Callable[[Tensor], Any]) -> None:
        """Draw the whole weights of all experts of the model, and keep this rank's shards.

        So the weights are the same for every number of ranks, as with ``use_cpu_initialization``.
        """
        tp_group = self.groups.expt_tp
        for expert in range(self.num_gemms * self.groups.ep.size()):
            drawn = torch.empty(whole)
            init_method(drawn)
            i = expert - self._first_expert
            if 0 <= i < self.num_gemms:
                pieces = drawn.chunk(stride * tp_group.size(), self.cut_dim)
                mine = pieces[tp_group.rank() :: tp_group.size()]
                self.get_parameter(f"weight{i}").copy_(torch.cat(mine, self.cut_dim))

    @property
    def _first_expert(self) -> int:
        first: int = self.groups.ep.rank() * self.num_gemms
        return first

    def _of_each_expert(self, name: str) -> list[torch.nn.Parameter]:
        return [self.get_parameter(f"{name}{i}") for i in range(self.num_gemms)]

    def forward(self, tokens: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Multiply the tokens of each expert by its weight. No collective.

        Args:
            tokens: ``(num_tokens, width)``, sorted by expert.
            tokens_per_expert: number of tokens of each expert.

        Returns:
            The results ``(num_tokens, width of the result)``, and the biases if they were not added, else
            None.
        """
        biases = self._of_each_expert("bias") if self.use_bias else None
        added = [None] * self.num_gemms if biases is None or self.skip_bias_add else biases
        parts = zip(tokens.split(tokens_per_expert), self._of_each_expert("weight"), added, strict=True)
        out = torch.cat([functional.linear(part, weight, bias) for part, weight, bias in parts])
        return out, [*biases] if biases is not None and self.skip_bias_add else None

    def get_extra_state(self) -> None:
        """Return None, so that checkpoints have the key that all other linear layers give them."""

    def set_extra_state(self, state: Any) -> None:
        """Do nothing."""

    @staticmethod
    def _drop_extra_states(layer: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Remove all but the first expert's extra state from ``state_dict``: the layer has only one."""
        for i in range(1, layer.num_gemms):
            state_dict.pop(f"{prefix}_extra_state{i}", None)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return this rank's shards under the keys of ``SequentialMLP``'s experts. No collective."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        num_experts = self.num_gemms * self.groups.ep.size()
        kinds = ["weight", "bias"] if self.use_bias else ["weight"]
        cuts = {"weight": self.cut_dim} | ({"bias": 0} if self.cut_dim == 0 else {})
        found = {}
        for i in range(self.num_gemms):
            expert = self._first_expert + i
            if metadata.get("singleton_local_shards", False):
                key, offsets = f"{expert}.{prefix}", sharded_offsets
            else:
                key = prefix
                offsets = (*sharded_offsets, (len(sharded_offsets), expert, num_experts))
            held = {kind: self.get_parameter(f"{kind}{i}") for kind in kinds}
            shards = make_sharded_tensors_for_checkpoint(
                {**held, "_extra_state": None},
                key,
                cuts,
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for kind in (*kinds, "_extra_state"):
                shard = shards[key + kind]
                # Copies of an expert are on the ranks of its own data-parallel group.
                shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
                number = "" if kind == "_extra_state" and i == 0 else i
                found[f"{prefix}{kind}{number}"] = shard
        return found


class ColumnGroupedLinear(_GroupedLinear):
    """Shards the rows of each weight, so that each rank computes other columns of the result."""

    cut_dim = 0


class RowGroupedLinear(_GroupedLinear):
    """Shards the columns of each weight, so that the ranks' results have to be summed."""

    cut_dim = 1


def _mark(param: Any, cut_dim: int | None, is_apart: bool) -> None:
    """Set the attributes of a parameter by which Megatron reduces its gradient and counts it in norms."""
    param.allreduce = not is_apart
    param.tensor_model_parallel = cut_dim is not None
    if cut_dim is not None:
        param.partition_dim = cut_dim
        param.partition_stride = 1


@functools.cache
def accept_grouped_experts() -> None:
    """Make the local specification build ``TEGroupedMLP`` where ``--moe-grouped-gemm`` asks for it.

    Megatron's own would silently build experts one by one, under other parameter names.
    """
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

    path = "megatron.core.models.backends:LocalSpecProvider.grouped_mlp_modules"
    build = private_api.existing(path)

    def choose(self: Any, moe_use_grouped_gemm: bool) -> Any:
        if not moe_use_grouped_gemm:
            return build(self, moe_use_grouped_gemm)
        layers = GroupedMLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear)
        return functools.partial(TEGroupedMLP, submodules=layers)

    private_api.replace(path, choose)
