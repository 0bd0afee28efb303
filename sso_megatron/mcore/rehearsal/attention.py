"""Latent attention and context parallelism for Megatron's local attention, which a rehearsal needs.

Megatron has both only for TransformerEngine's attention. The mathematics here is that of the local
attention on one rank: this rank's queries attend to every key that they may see.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from sso_megatron.mcore.compat import private_api

_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
_LATENT_ATTENTION = "megatron.core.transformer.multi_latent_attention"


@functools.cache
def accept_latent_attention() -> None:
    """Add two features to the local multi-latent attention that only TransformerEngine's has.

    - Values of another width than the queries: Megatron passes the attention both widths, and its
      constructor takes neither. The query's width only sets the softmax scale, which MLA passes as
      well; the value's width sets the width of the output.
    - Whole down-projections on every tensor-parallel rank. The local specification shards them, and
      the gradient of the key's rotary part, which all heads share, then lacks the other ranks' heads.
    """
    latent = f"{_LATENT_ATTENTION}:MLASelfAttention.__init__"
    construct, construct_mla = private_api.existing(f"{_ATTENTION}.__init__"), private_api.existing(latent)

    def construct_with_widths(
        self: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        construct(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    def construct_duplicated(self: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        whole = copy.copy(submodules)
        whole.linear_q_down_proj = whole.linear_kv_down_proj = DuplicatedLinear
        construct_mla(self, config, whole, *args, **kwargs)

    private_api.replace(f"{_ATTENTION}.__init__", construct_with_widths)
    private_api.replace(latent, construct_duplicated)
    # MLA compares with this class to know that a layer is duplicated.
    private_api.replace(f"{_LATENT_ATTENTION}:TELinear", DuplicatedLinear)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, **kwargs: Any
    ) -> None:
        """Make the layer from Megatron's arguments.

        Args:
            input_size: width of the input.
            output_size: width of the output.
            config: the model's ``TransformerConfig``.
            init_method: fills the weight.
            kwargs: names, and options that MLA does not use; ignored.
        """
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            drawn = torch.empty(output_size, input_size)  # in fp32, like every weight on the CPU
            init_method(drawn)
            self.weight.data.copy_(drawn)
        mark: Any = self.weight
        mark.allreduce = True
        mark.tensor_model_parallel = False
        # Each rank has only some of the tokens, so that Megatron has to sum the gradients.
        mark.sequence_parallel = config.sequence_parallel

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Return the product of ``(seq, batch, width)`` and the weight, and None as bias. No collective."""
        return torch.nn.functional.linear(tokens, self.weight), None

    def get_extra_state(self) -> None:
        """Return None, so that checkpoints have the key that all other linear layers give them."""

    def set_extra_state(self, state: Any) -> None:
        """Do nothing."""


@functools.cache
def accept_context_parallelism() -> None:
    """Make the local attention gather the keys and values of its context-parallel group.

    Every rank then holds the whole sequence of keys in its true order, and needs the mask's rows
    for its own queries. The memory that context parallelism saves on a GPU is not saved here.
    """
    construct, attend = (private_api.existing(f"{_ATTENTION}.{name}") for name in ("__init__", "forward"))

    def construct_any(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)  # the constructor asserts that there is no context parallelism
        alone.context_parallel_size = 1
        construct(self, alone, *args, **kwargs)
        self.config = config
        self.window_size = self.scale_mask_softmax.window_size
        if config.context_parallel_size > 1:
            # The softmax would make a window mask for as many queries as there are keys; see _mask.
            self.scale_mask_softmax.window_size = None

    def attend_whole(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.config.context_parallel_size > 1:
            key, value = (_whole_sequence(x, self.pg_collection.cp) for x in (key, value))
            attention_mask = _mask(self, attention_mask, key.size(0))
        out: Tensor = attend(self, query, key, value, attention_mask, *args, **kwargs)
        return out

    private_api.replace(f"{_ATTENTION}.__init__", construct_any)
    private_api.replace(f"{_ATTENTION}.forward", attend_whole)


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Return which two of the sequence's ``2 * size`` chunks a context-parallel rank holds, in order.

    One is from the front and one from the back, so that causal attention costs the same on every rank.
    """
    return rank, 2 * size - 1 - rank


def _whole_sequence(part: Tensor, cp_group: Any) -> Tensor:
    """Return the keys or values of all ranks, in the order of the sequence.

    Collectives: an all-gather over ``cp_group``, and a reduce-scatter of the gradient in backward.

    Args:
        part: ``(seq / cp, ...)``, this rank's keys or values.
        cp_group: context-parallel group.

    Returns:
        ``(seq, ...)``, contiguous.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    size = cp_group.size()
    gathered = gather_from_sequence_parallel_region(part, group=cp_group)
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    order = sorted(range(2 * size), key=held.__getitem__)
    chunks = gathered.view(2 * size, -1, *part.shape[1:])
    return chunks[order].view_as(gathered)


def _mask(attention: Any, given: Tensor | None, num_keys: int) -> Tensor | None:
    """Return the mask of the keys that this rank's queries must not see; None if they may see all keys.

    Args:
        attention: Megatron's local attention.
        given: the mask that came with the batch, whose rows were distributed with the tokens.
        num_keys: length of the whole sequence.

    Returns:
        True where masked, ``(seq / cp, seq)`` or as ``given``.
    """
    from megatron.core.transformer import utils
    from megatron.core.transformer.enums import AttnMaskType

    if attention.window_size is not None:  # a window replaces the batch's mask on one rank, too
        whole = utils.get_sliding_window_causal_mask(num_keys, num_keys, attention.window_size)
    elif given is not None or attention.attn_mask_type != AttnMaskType.causal:
        return given
    else:
        whole = utils.get_default_causal_mask(num_keys)
    cp_group = attention.pg_collection.cp
    rows = whole.view(2 * cp_group.size(), -1, num_keys)
    mine = rows[list(chunks_of(cp_group.rank(), cp_group.size()))]
    return torch.flatten(mine, 0, 1)
