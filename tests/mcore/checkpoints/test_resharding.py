"""Checkpoints loaded in another layout: the same state, and the same run from there on."""

import functools
from collections.abc import Callable

import pytest

from helpers.megatron_runs import FAMILY, MOE, Megatron, Run
from helpers.runs.reloading import Layout, assert_same_contents, assert_same_losses, go_on, leg, straight
from helpers.runs.summation_order import MOST, ORDERS, relative_losses

SHARDED = ["--use-distributed-optimizer"]
PP2 = ["--pipeline-model-parallel-size", 2]
EP2 = ["--expert-model-parallel-size", 2]
SMALL = ["--micro-batch-size", 1]


@pytest.fixture(scope="module")
def tp2_pp2(megatron: Megatron) -> Run:
    return straight(megatron, Layout(4, tp=2, flags=(*PP2,)), [])


TARGETS = {
    "tp1": Layout(1),
    "tp4": Layout(4, tp=4),  # cuts the two query groups
    "dp2": Layout(2),
    "dp2-sharded": Layout(2, flags=(*SHARDED,)),
    "pp2-dp2-sharded": Layout(4, flags=(*PP2, *SHARDED, "--ckpt-fully-parallel-load")),
    "tp2-distributed": Layout(2, tp=2, flags=("--spectral-tp-mode", "distributed")),
    "tp2-pp2-duplicated": Layout(4, tp=2, flags=(*PP2, "--spectral-tp-mode", "duplicated")),
}


@pytest.mark.parametrize("target", TARGETS)
def test_dense(megatron, tp2_pp2, target) -> None:
    go_on(megatron, TARGETS[target], [], tp2_pp2)


@pytest.mark.parametrize("optimizer", ["muon_sphere", *FAMILY])
def test_another_optimizer(megatron, optimizer) -> None:
    base = ["--optimizer", optimizer, *FAMILY.get(optimizer, [])]
    start = straight(megatron, Layout(2, flags=(*SHARDED,)), base)
    go_on(megatron, Layout(2, tp=2), base, start)


def test_masters_of_bfloat16(megatron) -> None:
    """Sharded and not: float32 masters and moments by value, losses as other orders of summation do."""
    base, sharded = ["--bf16"], Layout(2, flags=(*SHARDED,))
    start = straight(megatron, sharded, base)
    run = leg(megatron, Layout(2, tp=2), base, start)
    assert_same_contents(run, start, 10)
    reordered = [leg(megatron, sharded, base, start, calls=(order,)) for order in ORDERS]
    apart, *known = (relative_losses(other.losses, start.losses[10:]) for other in (run, *reordered))
    print(f"losses within {apart:.1e}, and {known} in other orders")
    assert apart <= MOST["losses"] * max(known)


FOUND_AGAIN = "they are found again"


def test_singular_vectors_are_found_again_for_other_matrices_only(megatron) -> None:
    distributed = Layout(2, tp=2, flags=("--spectral-tp-mode", "distributed"))
    start = straight(megatron, distributed, [])
    assert FOUND_AGAIN not in go_on(megatron, Layout(1), [], start).log
    for flags in (("--spectral-qkv-split", "group"), ("--sso-power-block", 8)):
        run = leg(megatron, Layout(1, flags=flags), [], start, stop=11)
        assert run.log.count(FOUND_AGAIN) == 1


EXPERTS = {"plain": ([], []), "sharded": (SHARDED, SHARDED), "sharded-and-back": (SHARDED, [])}


@pytest.fixture(scope="module")
def of_experts(megatron: Megatron) -> Callable[..., Run]:
    """A function that makes the straight run with these flags over EP 2, once."""
    return functools.cache(
        lambda *flags: straight(megatron, Layout(2, flags=(*EP2, *flags)), list(MOE), save_at=8)
    )


@pytest.mark.parametrize("who", EXPERTS)
@pytest.mark.parametrize("exclude", [[], ["--spectral-exclude", "local_experts"]], ids=["sso", "adamw"])
def test_experts(megatron, of_experts, who, exclude) -> None:
    """EP 2, EP 1, EP 2; experts under SSO, and under AdamW, whose groups know of expert parallelism."""
    at_ep2, at_ep1 = EXPERTS[who]
    base, wide = [*MOE, *exclude], Layout(2, flags=(*EP2, *at_ep2))
    first = of_experts(*at_ep2, *exclude)
    second = go_on(megatron, Layout(1, flags=(*at_ep1,)), base, first, at=8, stop=14)
    third = leg(megatron, wide, base, second, at=14)
    assert_same_contents(third, second, 14)
    assert_same_losses(third, first, 14)


@pytest.mark.parametrize(("before", "after"), [([], ["--moe-grouped-gemm"]), (["--moe-grouped-gemm"], [])])
def test_experts_one_by_one_and_grouped(megatron, of_experts, before, after) -> None:
    go_on(megatron, Layout(1, flags=(*after,)), [*MOE], of_experts(*before), at=8)


def test_expert_tensor_parallelism(megatron) -> None:
    flags = (*EP2, "--expert-tensor-parallel-size", 2, "--sequence-parallel", *SMALL)
    start = straight(megatron, Layout(4, tp=2, flags=flags), [*MOE])
    flags = ("--expert-tensor-parallel-size", 1, "--sequence-parallel", *SHARDED)
    for target in (Layout(2, tp=2, flags=flags), Layout(1)):
        go_on(megatron, target, [*MOE], start)
