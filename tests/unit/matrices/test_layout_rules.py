"""Which matrices a parameter holds, by its name, and what it is drawn as; parameters without a model."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sso_megatron.mcore.parameters import initialization
from sso_megatron.mcore.parameters.layouts import ModelParameter, has_rule, layout_of
from sso_megatron.mcore.parameters.names import global_names
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig

CONFIG: dict[str, Any] = {
    "gated_linear_unit": True,
    "num_attention_heads": 4,
    "num_query_groups": 1,
    "kv_channels": 4,
    "attention_output_gate": False,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "init_method": nn.init.normal_,
    "output_layer_init_method": nn.init.normal_,
}


def parameter(
    name: str, stored: Tensor, dim: int | None = None, size: int = 1, rank: int = 0, **more: Any
) -> ModelParameter:
    return ModelParameter(name, stored, SimpleNamespace(**CONFIG), dim, None, size, rank, **more)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_q_down_proj.weight",
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight",
        "decoder.layers.0.mlp.experts.linear_fc2.weight3",
        "decoder.layers.0.mlp.shared_experts.linear_fc2.weight",
        "decoder.layers.0.mlp.shared_experts.gate_weight",
        "decoder.layers.0.mlp.fc1_latent_proj.weight",
        "decoder.layers.0.mlp.fc2_latent_proj.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight",
        "mtp.layers.0.mtp_model_layer.layers.1.mlp.linear_fc2.weight",
    ],
)
def test_whole_matrices(name: str) -> None:
    (split,) = layout_of(parameter(name, torch.zeros(6, 5), 0, 2), SpectralConfig()).splits
    assert (split.label, split.shape, split.partition_dim) == ("", (12, 5), 0)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.foo_linear_proj.weight",
        "decoder.layers.0.self_attention.core_attention.indexer.linear_weights_proj.weight",
        "decoder.layers.0.self_attention.core_attention.indexer.linear_wq_b.weight",
        "decoder.layers.0.self_attention.in_proj.weight",
        "decoder.layers.0.mixer.in_proj.weight",
        "decoder.layers.0.mixer.out_proj.weight",
        "decoder.layers.0.cross_attention.linear_kv.weight",
        "decoder.layers.0.mlp.my_router.weight",
        "decoder.layers.0.mlp.other_linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight_scale",
    ],
)
def test_what_no_rule_covers_is_an_error(name: str) -> None:
    p = parameter(name, torch.zeros(6, 4))
    assert p.is_matrix and not has_rule(p)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} \(6, 4\): no rule .*--spectral-exclude"):
        layout_of(p, SpectralConfig())


def test_granularity_of_fused_weights() -> None:
    """Labels for each setting; down projections have no heads and stay whole unless they are fused."""
    at = "decoder.layers.0.self_attention"
    stored = {
        "linear_qkv": (24, ["q0", "q1", "q2", "q3", "k0", "v0"], ["q0", "k0", "v0"], ["q", "k", "v"]),
        "linear_q_up_proj": (32, *[["q0", "q1", "q2", "q3"]] * 2, ["q"]),
        "linear_q_proj": (32, *[["q0", "q1", "q2", "q3"]] * 2, ["q"]),
        "linear_kv_up_proj": (40, *[[f"{x}{h}" for h in range(4) for x in "kv"]] * 2, ["k", "v"]),
        "linear_qkv_down_proj": (28, *[["q", "kv"]] * 3),
    }
    for name, (rows, *by_granularity) in stored.items():
        p = parameter(f"{at}.{name}.weight", torch.zeros(rows, 5))
        for granularity, labels in zip(("head", "group", "component"), by_granularity, strict=True):
            layout = layout_of(p, SpectralConfig(qkv_split=granularity))
            assert [split.label for split in layout.splits] == labels
        (split,) = layout_of(p, SpectralConfig(qkv_split="whole")).splits
        assert (split.label, split.shape) == ("", (rows, 5))


def test_gate_and_up_or_whole() -> None:
    for name in (
        "mlp.linear_fc1.weight",
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.experts.linear_fc1.weight7",
    ):
        p = parameter(f"decoder.layers.0.{name}", torch.zeros(8, 5), 0, 2)
        assert [s.label for s in layout_of(p, SpectralConfig()).splits] == ["gate", "up"]
        (split,) = layout_of(p, SpectralConfig(mlp_split="whole")).splits
        assert split.shape == (16, 5)
    packed = parameter("experts.linear_fc1.weight", torch.zeros(2, 8, 5), 0, 2, experts=(2, 3))
    whole = layout_of(packed, SpectralConfig(mlp_split="whole")).splits
    assert [(s.label, s.shape) for s in whole] == [("expert2", (16, 5)), ("expert3", (16, 5))]


def test_biases_and_embeddings_are_no_matrices() -> None:
    assert not parameter("decoder.layers.0.mlp.experts.linear_fc1.bias", torch.zeros(4, 8)).is_matrix
    assert not parameter("embedding.position_embeddings.weight", torch.zeros(4, 8)).is_matrix
    assert not parameter("decoder.layers.0.mixer.conv1d.weight", torch.zeros(4, 1, 3)).is_matrix
    assert parameter("experts.linear_fc2.weight", torch.zeros(2, 4, 8), experts=(0, 1)).is_matrix


def test_layers_inside_layers_and_grouped_experts_are_numbered_globally() -> None:
    """The second stage's decoder, and a layer of multi-token prediction with a stack of its own."""
    chunk = nn.Module()
    chunk.module = nn.Module()
    for path, numbers in (("decoder", [5, 6]), ("mtp", [2])):
        block = nn.Module()
        block.layers = nn.ModuleList(nn.Module() for _ in numbers)
        chunk.module.add_module(path, block)
        for layer, number in zip(block.layers, numbers, strict=True):
            layer.layer_number = number
    inner = nn.Module()
    inner.layers = nn.ModuleList([nn.Module()])
    inner.layers[0].layer_number = 1
    chunk.module.mtp.layers[0].mtp_model_layer = inner
    rename = global_names(chunk, first_expert=8)
    assert {old: rename(f"module.{old}") for old in EXPECTED_NAMES} == EXPECTED_NAMES


EXPECTED_NAMES = {
    "decoder.layers.1.mlp.linear_fc1.weight": "decoder.layers.5.mlp.linear_fc1.weight",
    "decoder.layers.0.mlp.experts.linear_fc1.weight3": "decoder.layers.4.mlp.experts.linear_fc1.weight11",
    "decoder.layers.0.mlp.experts.linear_fc1.bias3": "decoder.layers.4.mlp.experts.linear_fc1.bias11",
    "decoder.layers.0.mlp.experts.linear_fc1.weight": "decoder.layers.4.mlp.experts.linear_fc1.weight",
    "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight": (
        "decoder.layers.4.mlp.experts.local_experts.8.linear_fc2.weight"
    ),
    "mtp.layers.0.mtp_model_layer.layers.0.mlp.router.weight": (
        "mtp.layers.1.mtp_model_layer.layers.0.mlp.router.weight"
    ),
    "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
}


# ---------------------------------------------------------------- initial weights, all ranks in one process


@pytest.mark.parametrize(
    ("name", "shape", "size", "more"),
    [
        ("self_attention.linear_qkv.weight", (24, 5), 8, {}),
        ("self_attention.linear_kv_up_proj.weight", (40, 5), 4, {}),
        ("self_attention.linear_qkv_down_proj.weight", (28, 5), 4, {}),
        ("mlp.linear_fc1.weight", (24, 5), 2, {}),
        ("mlp.shared_experts.linear_fc1.weight", (24, 5), 2, {"glu_interleave": 3}),
    ],
)
@pytest.mark.parametrize("granularity", ["head", "component", "whole"])
def test_initial_weights_do_not_depend_on_the_cut(
    monkeypatch, name, shape, size, more, granularity
) -> None:
    """Whatever is taken as one matrix: a rank gets its rows of the parts that Megatron sees."""
    monkeypatch.setattr(initialization, "_shared_seed", lambda: 7)
    shared = SpectralConfig(
        qkv_split=granularity, mlp_split="whole" if granularity == "whole" else "gate_up"
    )

    def drawn(ranks: int, **more: Any) -> dict[str, Tensor]:
        """Heads, gate and up, and so on, from the shards of all ranks."""
        parts: dict[str, list[Tensor]] = {}
        for rank in range(ranks):
            stored = torch.zeros(shape[0] // ranks, shape[1])
            dim = 0 if ranks > 1 else None
            p = parameter(f"decoder.layers.0.{name}", stored, dim, ranks, rank, **more)
            initialization.initialize_by_name([p], [p], SSOConfig(), shared)
            for split in layout_of(p, SpectralConfig()).splits:
                parts.setdefault(split.label, []).append(split.read(stored))
        return {label: torch.cat(found) for label, found in parts.items()}

    whole, cut = drawn(1), drawn(size, **more)
    assert whole.keys() == cut.keys()
    for label, matrix in whole.items():
        assert torch.equal(cut[label], matrix), label


def test_what_no_rule_covers_is_drawn_and_cut(monkeypatch) -> None:
    monkeypatch.setattr(initialization, "_shared_seed", lambda: 7)

    def drawn(dim: int | None, size: int) -> list[Tensor]:
        stored = [
            torch.zeros(8 // size if dim == 0 else 8, 6 // size if dim == 1 else 6) for _ in range(size)
        ]
        for rank, shard in enumerate(stored):
            p = parameter("decoder.layers.0.mixer.out_proj.weight", shard, dim, size, rank)
            initialization.initialize_by_name([p], [], SSOConfig(), SpectralConfig())
        return stored

    (whole,) = drawn(None, 1)
    assert torch.equal(torch.cat(drawn(0, 2)), whole) and torch.equal(torch.cat(drawn(1, 2), dim=1), whole)
