"""One training run, whatever the layout: real Megatron over Gloo against one rank, by value.

Every run starts from one rank's checkpoint and takes ten iterations in float32 (the last tests: bf16).
Losses of every iteration agree with the one-rank run to 1e-4, final weights of every logical matrix to
1e-3, relative.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MOE, Megatron, Run, assert_same_run, expert_by_itself, tiny

ITERATIONS = 10
DENSE = ["--num-layers", 4]
SP = "--sequence-parallel"
DIST = "--use-distributed-optimizer"
GROUPED = "--moe-grouped-gemm"
PP2 = ["--pipeline-model-parallel-size", 2]
VPP2 = ["--num-layers-per-virtual-pipeline-stage", 1]
CP2 = ["--context-parallel-size", 2]
EP2 = ["--expert-model-parallel-size", 2]
ETP1 = ["--expert-tensor-parallel-size", 1]
ETP2 = ["--expert-tensor-parallel-size", 2]

# Name: ranks, tensor-parallel size, further flags. The model has two query groups and four heads:
# with TP 4 every group is cut.
DENSE_LAYOUTS: dict[str, tuple[int, int, list[object]]] = {
    "tp2": (2, 2, []),
    "tp4": (4, 4, []),
    "tp2-sp": (2, 2, [SP]),
    "pp2": (2, 1, PP2),
    "pp2-vpp2": (2, 1, [*PP2, *VPP2]),
    "cp2": (2, 1, CP2),
    "tp2-cp2-sp": (4, 2, [*CP2, SP]),
    "dp2": (2, 1, []),
    "dp2-dist": (2, 1, [DIST]),
    "dp4-dist": (4, 1, ["--micro-batch-size", 1, DIST]),
    "pp2-dp2-dist": (4, 1, [*PP2, DIST]),
    "cp2-dist": (2, 1, [*CP2, DIST]),
    "tp2-pp2-dp2": (8, 2, PP2),
    "tp2-pp2-dp2-dist": (8, 2, [*PP2, DIST]),
    "uneven-pp2": (2, 1, [*PP2, "--decoder-first-pipeline-num-layers", 1]),
}
MOE_LAYOUTS: dict[str, tuple[int, int, list[object]]] = {
    "ep2": (2, 1, EP2),
    "ep2-pp2": (4, 1, [*EP2, *PP2]),
    "tp2-ep2-etp1": (2, 2, [SP, *EP2, *ETP1]),
    "tp2-etp2": (2, 2, [SP, *ETP2]),
    "tp2-ep2-etp2": (4, 2, [SP, *EP2, *ETP2]),
    "dp2-dist": (2, 1, [DIST]),
    "ep2-dist": (2, 1, [*EP2, DIST]),
    "ep2-dp2-dist": (4, 1, ["--micro-batch-size", 1, *EP2, DIST]),
    "tp2-etp1-dist": (2, 2, [SP, *ETP1, DIST]),
    "grouped": (1, 1, [GROUPED]),
    "grouped-ep2": (2, 1, [GROUPED, *EP2]),
    "grouped-tp2-ep2-etp2": (4, 2, [GROUPED, SP, *EP2, *ETP2]),
    "grouped-ep2-dp2-dist": (4, 1, ["--micro-batch-size", 1, GROUPED, *EP2, DIST]),
}
TP_MODES = ["duplicated", "owner", "distributed"]

Start = Callable[..., Run]


def starter(megatron: Megatron, model: list[object]) -> Start:
    """A function that trains ``model`` from one and the same checkpoint of one rank."""
    save = ["--save", "ckpt", "--save-interval", 1, "--ckpt-format", "torch_dist"]
    still = ["--train-iters", 1, "--lr", 0, "--lr-warmup-iters", 0]
    checkpoint: Path = megatron.run(tiny(*model, *still, *save, optimizer="adam")).folder / "ckpt"

    def start(ranks: int = 1, tp: int = 1, flags: list[object] = [], optimizer: str = "sso") -> Run:  # noqa: B006
        load = ["--load", checkpoint, "--finetune", "--no-load-optim", "--no-load-rng"]
        argv = tiny(*model, *load, "--train-iters", ITERATIONS, *flags, tp=tp, optimizer=optimizer)
        return megatron.train(argv, ranks, calls=("probes:weights",))

    return start


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Start:
    return starter(megatron, DENSE)


@pytest.fixture(scope="module")
def moe(megatron: Megatron) -> Start:
    return starter(megatron, list(MOE))


@pytest.fixture(scope="module")
def dense_reference(dense: Start) -> Run:
    return dense()


@pytest.fixture(scope="module")
def moe_reference(moe: Start) -> Run:
    return moe()


def assert_stored_on_the_sphere(run: Run) -> None:
    """Retraction changes what is stored: exact SVD of every logical matrix, read from the parameters.

    The last iteration's learning rate is zero, so that its retraction is all that it does.
    """
    initial, final = run.merged("initial"), run.merged("final")
    for name, (_, radius) in run.merged("retracted").items():
        before, after = (torch.linalg.svdvals(w[name].double())[0].item() for w in (initial, final))
        assert abs(before - radius) > 1e-2 * radius, "Megatron's initial weights are not there"
        assert abs(after - radius) <= 1e-3 * radius, name


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_dense(dense: Start, dense_reference: Run, layout: str) -> None:
    run = dense(*DENSE_LAYOUTS[layout])
    assert_same_run(run, dense_reference)
    assert_stored_on_the_sphere(run)
    assert run.losses[-1] < 0.99 * run.losses[0], "it trains"


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_moe(moe: Start, moe_reference: Run, layout: str) -> None:
    run = moe(*MOE_LAYOUTS[layout])
    assert_same_run(run, moe_reference)
    assert_stored_on_the_sphere(run)


@pytest.mark.parametrize("mode", TP_MODES)
@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_every_tp_mode_dense(dense: Start, dense_reference: Run, mode: str, layout: str) -> None:
    ranks, tp, flags = DENSE_LAYOUTS[layout]
    assert_same_run(dense(ranks, tp, [*flags, "--spectral-tp-mode", mode]), dense_reference)


@pytest.mark.parametrize("mode", TP_MODES)
def test_every_tp_mode_moe(moe: Start, moe_reference: Run, mode: str) -> None:
    ranks, tp, flags = MOE_LAYOUTS["tp2-ep2-etp2"]
    assert_same_run(moe(ranks, tp, [*flags, "--spectral-tp-mode", mode]), moe_reference)


def test_muon_sphere(dense: Start) -> None:
    reference = dense(optimizer="muon_sphere")
    for layout in ("tp2", "dp2-dist", "tp2-pp2-dp2-dist"):
        assert_same_run(dense(*DENSE_LAYOUTS[layout], optimizer="muon_sphere"), reference)


@pytest.mark.parametrize("mode", TP_MODES)
def test_component_qkv_is_cut_by_tp(dense: Start, mode: str) -> None:
    """Q, K and V as one matrix each: what heads spare, tensor parallelism cuts."""
    split = ["--spectral-qkv-split", "component"]
    reference = dense(flags=split)
    assert_same_run(dense(2, 2, [*split, "--spectral-tp-mode", mode]), reference)


def test_blockwise_is_another_result(dense: Start, dense_reference: Run) -> None:
    run = dense(2, 2, ["--spectral-tp-mode", "blockwise"])
    apart = max(
        abs(got - wanted) / wanted for got, wanted in zip(run.losses, dense_reference.losses, strict=True)
    )
    assert apart > 1e-3, "if this were equal, the documentation's warning would be wrong"
    assert run.losses[-1] < 0.99 * run.losses[0]


# bf16 activations carry 8 bits, so losses differ by about 2^-9 of themselves, and gradients by as much
# in every product: a layout changes the order of sums. Weights are compared by how far they moved.
BF16_LOSSES, BF16_MOVES = 4e-3, 0.3


def assert_same_bf16_run(run: Run, reference: Run) -> None:
    assert_same_run(run, reference, losses=BF16_LOSSES, weights=1.0)
    start, wanted = reference.merged("initial"), reference.merged("final")
    initial, final = run.merged("initial"), run.merged("final")
    for grouped in initial:
        name = grouped if grouped in start else expert_by_itself(grouped)
        assert torch.equal(initial[grouped], start[name]), "the same initial weights"
        move = torch.linalg.norm(wanted[name] - start[name])
        assert torch.linalg.norm(final[grouped] - wanted[name]) <= BF16_MOVES * move, name


@pytest.mark.parametrize("layout", ["tp2", "tp4", "cp2", "dp2-dist", "tp2-pp2-dp2-dist"])
def test_dense_bf16(dense: Start, bf16_references: dict[str, Run], layout: str) -> None:
    ranks, tp, flags = DENSE_LAYOUTS[layout]
    assert_same_bf16_run(dense(ranks, tp, ["--bf16", *flags]), bf16_references["dense"])


@pytest.mark.parametrize("layout", ["tp2-ep2-etp2", "ep2-dp2-dist", "grouped-ep2"])
def test_moe_bf16(moe: Start, bf16_references: dict[str, Run], layout: str) -> None:
    ranks, tp, flags = MOE_LAYOUTS[layout]
    assert_same_bf16_run(moe(ranks, tp, ["--bf16", *flags]), bf16_references["moe"])


@pytest.fixture(scope="module")
def bf16_references(dense: Start, moe: Start) -> dict[str, Run]:
    return {"dense": dense(flags=["--bf16"]), "moe": moe(flags=["--bf16"])}
