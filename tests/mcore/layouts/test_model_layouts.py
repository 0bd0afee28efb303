"""Logical matrices of real models: global names and shapes, placement, values and initial weights."""

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch

from helpers.megatron_runs import MOE, Megatron, Run, tiny

Shapes = dict[str, tuple[int, int]]


def heads(layer: str, label: str, numbers: Iterable[int], shape: tuple[int, int]) -> Shapes:
    return {f"{layer}[{label}{n}]": shape for n in numbers}


def attention(layer: str, queries: int = 4, groups: int = 2, gated: bool = False) -> Shapes:
    """Head by head, sixteen rows each; the tiny model is 64 wide."""
    qkv, shape = f"{layer}.self_attention.linear_qkv.weight", (16, 64)
    return {
        f"{layer}.self_attention.linear_proj.weight": (64, 64),
        **heads(qkv, "q", range(queries), shape),
        **heads(qkv, "gate", range(queries if gated else 0), shape),
        **heads(qkv, "k", range(groups), shape),
        **heads(qkv, "v", range(groups), shape),
    }


def mlp(name: str, width: int) -> Shapes:
    return {
        f"{name}.linear_fc1.weight[gate]": (width, 64),
        f"{name}.linear_fc1.weight[up]": (width, 64),
        f"{name}.linear_fc2.weight": (64, width),
    }


def experts(layer: str) -> Shapes:
    """Four routed ones and what is around them."""
    shapes = {f"{layer}.mlp.router.weight": (4, 64), **mlp(f"{layer}.mlp.shared_experts", 32)}
    for expert in range(4):
        shapes |= mlp(f"{layer}.mlp.experts.local_experts.{expert}", 48)
    return shapes


def latent(layer: str) -> Shapes:
    """Ranks 32 and 16; heads of 8 + 8 rows for q and k, of which 8 are shared for k, and of 12 for v."""
    at = f"{layer}.self_attention"
    return {
        f"{at}.linear_proj.weight": (64, 48),
        f"{at}.linear_q_down_proj.weight": (32, 64),
        f"{at}.linear_kv_down_proj.weight": (24, 64),
        **heads(f"{at}.linear_q_up_proj.weight", "q", range(4), (16, 32)),
        **heads(f"{at}.linear_kv_up_proj.weight", "k", range(4), (8, 16)),
        **heads(f"{at}.linear_kv_up_proj.weight", "v", range(4), (12, 16)),
    }


def latent_components(layer: str) -> Shapes:
    """The same heads, and q without a down projection."""
    at = f"{layer}.self_attention"
    return {
        f"{at}.linear_proj.weight": (64, 48),
        f"{at}.linear_q_proj.weight[q]": (64, 64),
        f"{at}.linear_kv_down_proj.weight": (24, 64),
        f"{at}.linear_kv_up_proj.weight[k]": (32, 16),
        f"{at}.linear_kv_up_proj.weight[v]": (48, 16),
    }


def components(layer: str) -> Shapes:
    """Eight q heads and two of k and v, of eight rows."""
    qkv = f"{layer}.self_attention.linear_qkv.weight"
    return {
        f"{layer}.self_attention.linear_proj.weight": (64, 64),
        f"{qkv}[q]": (64, 64),
        f"{qkv}[k]": (16, 64),
        f"{qkv}[v]": (16, 64),
    }


LAYERS_OF_FOUR = [f"decoder.layers.{i}" for i in range(4)]
LAYERS = LAYERS_OF_FOUR[:2]
NEXT_TOKENS = "mtp.layers.0.mtp_model_layer"
LATENT = ["--multi-latent-attention", "--kv-lora-rank", 16, "--qk-head-dim", 8, "--qk-pos-emb-head-dim", 8]
LATENT += ["--v-head-dim", 12]
LATENT_MOE = [*LATENT, "--q-lora-rank", 32, *MOE]
EIGHT_HEADS = ["--num-attention-heads", 8, "--kv-channels", 8]
LARGER = ["--sso-radius-scaler", 2]
PP2 = ["--pipeline-model-parallel-size", 2]
SP, EP2, ETP1 = (
    "--sequence-parallel",
    ["--expert-model-parallel-size", 2],
    ["--expert-tensor-parallel-size", 1],
)


def joined(*shapes: Shapes) -> Shapes:
    return {name: shape for part in shapes for name, shape in part.items()}


LATENT_MOE_SHAPES = joined(
    *(latent(layer) for layer in LAYERS), mlp(f"{LAYERS[0]}.mlp", 96), experts(LAYERS[1])
)
# Flags, the matrices they make, and a parallel layout: tensor-parallel size, ranks, flags.
MODELS: dict[str, tuple[list[Any], Shapes, int, int, list[Any]]] = {
    "multi-query": (
        ["--num-query-groups", 1],
        joined(*(attention(layer, groups=1) | mlp(f"{layer}.mlp", 96) for layer in LAYERS)),
        *(4, 4, []),
    ),
    "components": (
        [*EIGHT_HEADS, "--spectral-qkv-split", "component", *LARGER],
        joined(*(components(layer) | mlp(f"{layer}.mlp", 96) for layer in LAYERS)),
        *(4, 4, []),
    ),
    "gated-attention-more-tokens": (
        ["--attention-output-gate", "--mtp-num-layers", 1],
        joined(
            *(attention(at, gated=True) | mlp(f"{at}.mlp", 96) for at in [*LAYERS, NEXT_TOKENS]),
            {"mtp.layers.0.eh_proj.weight": (64, 128)},
        ),
        *(2, 4, PP2),
    ),
    "latent-experts": (LATENT_MOE, LATENT_MOE_SHAPES, 2, 4, [SP, *EP2]),
    "latent-experts-uncut": (LATENT_MOE, LATENT_MOE_SHAPES, 2, 2, [SP, *ETP1]),
    "latent-components-virtual-stages": (
        ["--num-layers", 4, *LATENT, "--spectral-qkv-split", "component"],
        joined(*(latent_components(at) | mlp(f"{at}.mlp", 96) for at in LAYERS_OF_FOUR)),
        *(2, 4, [SP, *PP2, "--num-layers-per-virtual-pipeline-stage", 1]),
    ),
}


def assert_drawn_independently(weights: Collection[torch.Tensor]) -> None:
    """No two matrices of a shape are alike: of layers, heads or experts.

    The cosine of two independent ones has a standard deviation of one by the root of their entries, which
    are 128 and more: the bound is five times that.
    """
    for shape in {weight.shape for weight in weights}:
        some = torch.stack([weight.double().flatten() for weight in weights if weight.shape == shape])
        some /= torch.linalg.vector_norm(some, dim=1, keepdim=True)
        assert (some @ some.mT - torch.eye(len(some))).abs().max() < 0.45, shape


def first_loss(run: Run) -> float:
    return float(re.findall(r"lm loss: (\S+)", run.log)[0])


@pytest.fixture(scope="module")
def build(megatron: Megatron) -> Any:
    """A function that builds a model and runs one iteration; each model is built once."""
    runs: dict[str, Run] = {}

    def run(flags: list[Any], tp: int = 1, ranks: int = 1) -> Run:
        argv = tiny(*flags, "--spectral-mup-init", "--train-iters", 1, "--lr-warmup-iters", 0, tp=tp)
        if "--multi-latent-attention" in flags:
            at = argv.index("--group-query-attention")
            del argv[at : at + 3]  # with the number of groups; Megatron refuses it here
            if "--q-lora-rank" not in flags:
                argv.remove("--qk-layernorm")  # it would norm what is between two projections of q
        if (key := " ".join(argv)) not in runs:
            calls = ("probes.layout:matrices", "probes.layout:no_update")
            runs[key] = megatron.run(argv, ranks, calls=calls)
        return runs[key]

    return run


@pytest.mark.parametrize("name", MODELS)
def test_matrices_of_a_model(build: Any, name: str) -> None:
    """Every name and shape; equal initial weights on their spheres; and the same loss from them.

    The loss says that the shards of one logical matrix are used as one by Megatron.
    """
    flags, expected, tp, ranks, parallel = MODELS[name]
    scaler = 2 if flags[-2:] == LARGER else 1
    single, cut = build(flags), build([*flags, *parallel], tp, ranks)
    for run in (single, cut):
        found = {name: tuple(matrix.shape) for name, matrix in run.merged("matrices").items()}
        assert found == expected
    for matrix, weight in single.merged("matrices").items():
        torch.testing.assert_close(cut.merged("matrices")[matrix], weight, rtol=0, atol=0)
        norm = torch.linalg.svdvals(weight.double())[0].item()
        assert norm == pytest.approx(scaler * math.sqrt(weight.shape[0] / weight.shape[1]), rel=1e-3), (
            matrix
        )
    assert_drawn_independently(single.merged("matrices").values())
    assert first_loss(cut) == pytest.approx(first_loss(single), rel=1e-5)
    assert all(place == (None, None) for place in single.merged("placement").values())


def test_heads_cut_over_ranks(build: Any) -> None:
    """One query group over four ranks, 24 rows each: heads of 16 rows begin at 0, 16, 32 and so on."""
    run = build(["--num-query-groups", 1], 4, 4)
    place = run.merged("placement")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert {label: place[f"{name}[{label}]"] for label in ("q0", "q1", "q2", "q3", "k0", "v0")} == {
        "q0": (None, None),
        "q1": (0, (8, 8, 0, 0)),
        "q2": (None, None),
        "q3": (None, None),
        "k0": (0, (0, 0, 8, 8)),
        "v0": (None, None),
    }
    for rank, saved in enumerate(run.saved("placement")):
        assert {f"{name}[q1]", f"{name}[k0]"} < saved.keys(), "all ranks take part in cut matrices"
        assert (f"{name}[v0]" in saved) == (rank == 3)


@pytest.fixture(scope="module")
def stored_experts(megatron: Megatron) -> Run:
    flags = [*MOE, "--sequence-parallel", "--expert-model-parallel-size", 2]
    argv = tiny(*flags, "--expert-tensor-parallel-size", 2, "--spectral-mup-init", tp=2)
    calls = ("probes.layout:matrices", "probes.layout:stored_experts", "probes.layout:stop")
    return megatron.run(argv, 4, calls=calls)


@pytest.mark.parametrize("form", ["grouped", "interleaved", "3-D", "2-D"])
def test_every_way_to_store_experts(stored_experts: Run, form: str) -> None:
    """The same matrices, under their expert's global number, with the same initial weights."""
    by_itself = stored_experts.merged("matrices")
    found = stored_experts.merged(form)
    layer = "decoder.layers.1.mlp.experts"
    expected = {}
    for expert in range(4):
        for fc, label in (("linear_fc1", "gate"), ("linear_fc1", "up"), ("linear_fc2", "")):
            source = f"{layer}.local_experts.{expert}.{fc}.weight" + (f"[{label}]" if label else "")
            if form in ("grouped", "interleaved"):
                name = f"{layer}.{fc}.weight{expert}" + (f"[{label}]" if label else "")
            else:
                name = f"{layer}.{fc}.weight[expert{expert}{'.' if label else ''}{label}]"
            expected[name] = by_itself[source]
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_a_model_with_grouped_experts_begins_as_with_experts_by_themselves(build: Any) -> None:
    """Other parameters under other names, the same matrices and loss."""
    single = build(LATENT_MOE)
    grouped = build([*LATENT_MOE, "--moe-grouped-gemm", SP, *EP2], 2, 4)
    found = {
        re.sub(r"experts\.(linear_fc\d)\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name): weight
        for name, weight in grouped.merged("matrices").items()
    }
    assert found.keys() == LATENT_MOE_SHAPES.keys() != grouped.merged("matrices").keys()
    for name, weight in single.merged("matrices").items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    assert first_loss(grouped) == pytest.approx(first_loss(single), rel=1e-5)


def test_hybrid_stack_has_the_names_of_a_gpt(megatron: Megatron) -> None:
    """Attention and MLP as layers of their own; numbers from the stage's offset of six layers."""
    run = megatron.run(tiny(tp=2), 2, calls=("probes.layout:hybrid_names", "probes.layout:stop"))
    found = {name: tuple(matrix.shape) for name, matrix in run.merged("hybrid").items()}
    assert found == attention("decoder.layers.6") | mlp("decoder.layers.7.mlp", 96)
