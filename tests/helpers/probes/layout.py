"""What a rank's real Megatron model says of its logical matrices, without the optimizer's engine."""

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from helpers.probes import save


def _when_found(look: Callable[[Any, Any], None]) -> None:
    """Have ``look(layouts, model_chunks)`` called when the matrices of the built model are found."""
    from sso_megatron.mcore.optimizer import registration

    original = registration.prepare_model

    @functools.wraps(original)
    def prepare_model(model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        layouts = original(model_chunks, *args, **kwargs)
        look(layouts, model_chunks)
        return layouts

    registration.prepare_model = prepare_model


def _whole_matrices(layouts: Any) -> dict[str, torch.Tensor]:
    """Every logical matrix of this rank, put together over its group."""
    import torch.distributed as dist

    found: dict[str, torch.Tensor] = {}
    for param, layout in layouts:
        for split in layout.splits:
            part = split.read(param.detach()).clone()
            if split.partition_dim is not None:
                parts: list[Any] = [None] * dist.get_world_size(layout.tp_group)
                dist.all_gather_object(parts, part, group=layout.tp_group)
                if split.shard_rows is not None:
                    assert split.shard_rows == tuple(map(len, parts))
                part = torch.cat(parts, split.partition_dim)
            assert tuple(part.shape) == split.shape
            assert layout.matrix_name(split) not in found
            found[layout.matrix_name(split)] = part
    return found


def matrices() -> None:
    """Save placement and whole values of the built model's logical matrices, by global name."""

    def look(layouts: Any, model_chunks: Any) -> None:
        save(
            "placement",
            {
                layout.matrix_name(split): (split.partition_dim, split.shard_rows)
                for _, layout in layouts
                for split in layout.splits
            },
        )
        save("matrices", _whole_matrices(layouts))

    _when_found(look)


def no_update() -> None:
    """Leave the weights as they are: an iteration prints the loss of the initial weights."""
    from megatron.core.optimizer import ChainedOptimizer

    ChainedOptimizer.step = lambda self: (True, 0.0, 0)


def _nest(leaves: dict[str, nn.Module]) -> nn.Module:
    """Modules inside modules, by dotted name."""
    root = nn.Module()
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.add_module(last, leaf)
    return root


def _linear(weights: dict[str, torch.Tensor]) -> nn.Module:
    """A layer of routed experts, marked as TransformerEngine does that does not know of the cut."""
    layer = nn.Module()
    for name, value in weights.items():
        param = nn.Parameter(value)
        param.allreduce = False
        param.tensor_model_parallel, param.partition_dim = True, 0
        layer.register_parameter(name, param)
    return layer


def stored_experts() -> None:
    """Save the matrices and the stored weights of experts in every form that Megatron stores them in.

    Each form is a model of one layer, the second of the whole one, with the parameters of this rank.
    """

    def look(layouts: Any, model_chunks: Any) -> None:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe.experts import TEGroupedMLP
        from megatron.core.utils import get_model_config, get_pg_size

        from sso_megatron.mcore.parameters.initialization import initialize_by_name
        from sso_megatron.mcore.parameters.layouts import layout_of, model_parameters
        from sso_megatron.optimizers.config import SpectralConfig, SSOConfig

        groups = ProcessGroupCollection.use_mpu_process_groups()
        config = get_model_config(model_chunks[0])
        count, width = config.num_moe_experts // get_pg_size(groups.ep), config.moe_ffn_hidden_size
        width //= get_pg_size(groups.expt_tp)
        shapes = {"linear_fc1": (2 * width, config.hidden_size), "linear_fc2": (config.hidden_size, width)}

        def build(form: str) -> nn.Module:
            leaves = {}
            for name, (rows, columns) in shapes.items():
                stored = {
                    "3-D": {"weight": torch.zeros(count, rows, columns)},
                    "2-D": {"weight": torch.zeros(count * rows, columns)},
                }.get(form, {f"weight{i}": torch.zeros(rows, columns) for i in range(count)})
                leaves[f"module.decoder.layers.0.mlp.experts.{name}"] = _linear(stored)
            model = _nest(leaves)
            model.get_submodule("module.decoder.layers.0").layer_number = 2
            model.config = copy.copy(config)
            model.config.moe_mlp_glu_interleave_size = 4 if form == "interleaved" else None
            return model

        stored = {}
        for form in ("grouped", "3-D", "2-D", "interleaved"):
            model = build(form)
            parameters = list(model_parameters([model], groups))
            assert all(p.is_matrix for p in parameters)
            shared = SpectralConfig()
            initialize_by_name(parameters, parameters, SSOConfig(), shared)
            save(form, _whole_matrices([(p.param, layout_of(p, shared)) for p in parameters]))
            stored[form] = {p.name: p.param.detach() for p in parameters}
        # What Megatron's forward pass makes of the interleaved weights, from its own function.
        for name, weight in stored["interleaved"].items():
            if "linear_fc1" in name:
                weight = TEGroupedMLP._remove_glu_interleaving(weight.t().contiguous(), 4).t()
            assert torch.equal(weight, stored["grouped"][name]), name

    _when_found(look)


def hybrid_names() -> None:
    """Save the matrices of a hybrid stack's second stage, its layers made of the local linear layers."""

    def look(layouts: Any, model_chunks: Any) -> None:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.ssm.mlp_layer import MLPLayer
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import TransformerLayer
        from megatron.core.utils import get_model_config

        from sso_megatron.mcore.parameters.layouts import layout_of, model_parameters
        from sso_megatron.optimizers.config import SpectralConfig

        groups = ProcessGroupCollection.use_mpu_process_groups()
        attention, mlp = get_gpt_layer_local_submodules(), get_gpt_layer_local_submodules()
        attention.mlp = mlp.self_attention = IdentityOp
        stack = HybridStack(
            get_model_config(model_chunks[0]),
            HybridStackSubmodules(
                attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
                mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            ),
            layer_type_list=["*", "-"],
            pp_layer_offset=6,
            post_layer_norm=False,
            pg_collection=groups,
        )
        model = _nest({"module.decoder": stack})
        model.config = stack.config
        found = [p for p in model_parameters([model], groups) if p.is_matrix]
        save("hybrid", _whole_matrices([(p.param, layout_of(p, SpectralConfig())) for p in found]))

    _when_found(look)


def stop() -> None:
    """End the rank when everything that was asked for has been saved: nothing is trained."""
    _when_found(lambda layouts, model_chunks: os._exit(0))
