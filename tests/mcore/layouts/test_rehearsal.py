"""The CPU rehearsal: real Megatron in many layouts trains what one rank trains, with Adam.

So what these runs show of a spectral optimizer is the optimizer's own.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.megatron_runs import MOE, Megatron, Run, tiny

ITERATIONS = 6

# What the tiny GPT becomes, several things at once where they do not meet.
MODELS: dict[str, list[str]] = {
    "dense": [],
    "deep": ["--num-layers", "4"],
    "gated": ["--attention-output-gate", "--window-size", "5,0"],
    "latent": shlex.split(
        "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 32 --qk-head-dim 16 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 24"
    ),
    "mtp": ["--mtp-num-layers", "1", "--attention-output-gate", "--num-query-groups", "1"],
    "moe": [*MOE, "--micro-batch-size", "1"],  # so that data parallelism can be 4
    # Every layer of the pattern is an attention, an MLP or a group of experts by itself.
    "hybrid": [*MOE, "--hybrid-layer-pattern", "*-*E"],
}

SP = "--sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ETP = "--expert-tensor-parallel-size"
GROUPED = "--moe-grouped-gemm"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
HALF = ITERATIONS // 2

# Model, ranks, tensor-parallel size, flags. Context parallelism meets the data loader's mask, the
# attention's own, and a window.
LAYOUTS: dict[str, tuple[str, int, int, str]] = {
    "tp2-sp-pp2-dp2": ("dense", 8, 2, f"{SP} {PP2}"),
    "dp2-distributed-optimizer": ("dense", 2, 1, OVERLAP),
    "pp2-vpp2": ("deep", 2, 1, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "uneven-stages": ("deep", 2, 1, f"{PP2} --decoder-first-pipeline-num-layers 1"),
    "two-groups-tp4": ("gated", 4, 4, ""),
    "cp2": ("dense", 2, 1, CP2),
    "cp2-tp2-sp": ("gated", 4, 2, f"{CP2} {SP}"),
    "latent-cp2": ("latent", 2, 1, f"{CP2} --no-create-attention-mask-in-dataloader"),
    "latent-tp2-sp": ("latent", 2, 2, SP),
    "one-group-mtp-tp2-pp2": ("mtp", 4, 2, PP2),
    "grouped": ("moe", 1, 1, GROUPED),
    "grouped-ep2-dp2": ("moe", 4, 1, f"{GROUPED} {EP2} --save saved --save-interval {HALF}"),
    "grouped-ep2-etp2": ("moe", 4, 2, f"{GROUPED} {EP2} {ETP} 2 {SP}"),
    "hybrid-tp2-pp2-ep2": ("hybrid", 4, 2, f"{PP2} {EP2} {ETP} 1 {SP}"),
}


def command(model: str, *flags: Any, tp: int = 1) -> list[str]:
    argv = tiny(*MODELS[model], *flags, "--train-iters", ITERATIONS, tp=tp, optimizer="adam")
    if model == "latent":
        argv.remove("--group-query-attention")
    if model == "hybrid":
        where = argv.index("--moe-layer-freq")  # the pattern says where the experts are
        del argv[where : where + 2]
    return [*argv, "--spectral-run-dir", ".", "--ckpt-format", "torch_dist"]


def loading(folder: Path) -> list[Any]:
    return ["--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]


class Runs:
    """Runs by name, each made once."""

    def __init__(self, megatron: Megatron) -> None:
        self.megatron = megatron
        self.made: dict[str, Run] = {}

    def on_one_rank(self, model: str) -> Run:
        """It leaves what it started from in the folder ``initial``."""
        calls = ("probes.rehearsal:save_initial_checkpoint", "probes.rehearsal:parameters")
        return self._make(model, command(model), 1, calls)

    def in_layout(self, name: str) -> Run:
        """It starts from what one rank started from."""
        model, ranks, tp, flags = LAYOUTS[name]
        start = loading(self.on_one_rank(model).folder / "initial")
        argv = command(model, *start, *shlex.split(flags), tp=tp)
        return self._make(name, argv, ranks, ("probes.rehearsal:parameters",))

    def _make(self, key: str, argv: list[str], ranks: int, calls: tuple[str, ...]) -> Run:
        if key not in self.made:
            self.made[key] = self.megatron.run(argv, ranks, calls)
        return self.made[key]


@pytest.fixture(scope="module")
def runs(megatron: Megatron) -> Runs:
    return Runs(megatron)


def worst(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two runs."""
    pairs = zip(losses, reference, strict=True)
    return max(abs(got - expected) / expected for got, expected in pairs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_what_one_rank_trains(runs: Runs, name: str) -> None:
    run, single = runs.in_layout(name), runs.on_one_rank(LAYOUTS[name][0])
    assert len(run.losses) == ITERATIONS
    assert worst(run.losses, single.losses) <= 1e-4
    assert run.losses[-1] < 0.95 * run.losses[0], "it trains"


def test_grouped_experts_have_the_names_and_marks_of_a_gpu(runs: Runs) -> None:
    """Those of TEGroupedMLP over TransformerEngine: two of four experts, each cut over two ranks."""
    ours = {"allreduce": False, "tensor_model_parallel": True, "partition_stride": 1}
    for found in runs.in_layout("grouped-ep2-etp2").saved("parameters"):
        experts = {n.partition("experts.")[2]: p for n, p in found.items() if ".mlp.experts." in n}
        assert experts == {
            **{f"linear_fc1.weight{i}": ((48, 64), {**ours, "partition_dim": 0}) for i in (0, 1)},
            **{f"linear_fc2.weight{i}": ((64, 24), {**ours, "partition_dim": 1}) for i in (0, 1)},
        }


def test_experts_one_by_one_go_on_from_grouped_ones(runs: Runs, megatron: Megatron) -> None:
    """From four ranks to one. Megatron itself cannot bring Adam's moments over: its groups differ."""
    saved = runs.in_layout("grouped-ep2-dp2").folder / "saved"
    load = ["--load", saved, "--ckpt-step", HALF, "--no-load-optim", "--no-load-rng"]
    run = megatron.run(command("moe", *load))
    assert len(run.losses) == ITERATIONS - HALF
    assert worst(run.losses[:1], runs.on_one_rank("moe").losses[HALF : HALF + 1]) <= 1e-4


def test_latent_attention_is_duplicated_where_a_gpu_duplicates_it(runs: Runs) -> None:
    """Only the up-projections are cut, and gradients of the down-projections are summed."""
    for found in runs.in_layout("latent-tp2-sp").saved("parameters"):
        attention = "decoder.layers.0.self_attention."
        for name, shape in (("linear_q_down_proj", (24, 64)), ("linear_kv_down_proj", (40, 64))):
            weight = found[f"{attention}{name}.weight"]
            assert weight[0] == shape
            assert weight[1]["sequence_parallel"] and not weight[1]["tensor_model_parallel"]
        assert found[f"{attention}linear_q_up_proj.weight"][0] == (48, 24)


def test_a_hybrid_model_has_a_module_a_layer(runs: Runs) -> None:
    (found,) = runs.on_one_rank("hybrid").saved("parameters")
    matrices = [n for n, (shape, _) in found.items() if "decoder" in n and len(shape) == 2]
    first = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    assert matrices == [
        *(f"decoder.layers.0.{name}.weight" for name in first),
        *(f"decoder.layers.1.mlp.linear_fc{i}.weight" for i in (1, 2)),
        *(f"decoder.layers.2.{name}.weight" for name in first),
        "decoder.layers.3.mlp.router.weight",
        *(f"decoder.layers.3.mlp.experts.linear_fc{i}.weight{e}" for i in (1, 2) for e in range(4)),
        *(f"decoder.layers.3.mlp.shared_experts.linear_fc{i}.weight" for i in (1, 2)),
    ]


@pytest.mark.parametrize(
    ("model", "tp", "flags", "message"),
    [
        ("latent", 2, "", "--tensor-model-parallel-size 2 needs --sequence-parallel"),
        ("hybrid", 1, "--hybrid-layer-pattern M-*-", "M is a Mamba layer, which needs kernels for GPUs"),
        ("dense", 1, "--hybrid-context-parallel", "exists only in TransformerEngine"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(megatron, model, tp, flags, message) -> None:
    run = megatron.run(command(model, *shlex.split(flags), tp=tp), fails=True)
    assert run.codes == [2]
    assert message in run.log.splitlines()[-1]
