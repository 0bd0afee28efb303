"""Scripts without Megatron's command line: whatever DDP does to gradients, the run is right or refused."""

import json

import pytest
import torch

from helpers.comparisons import worst_error
from helpers.megatron_runs import Megatron, Run

SHARDS = {"use_distributed_optimizer": True}
OVERLAP = SHARDS | {"overlap_grad_reduce": True, "overlap_param_gather": True}
MAIN = "tasks.own_script:train"


def run(megatron: Megatron, ranks: int, ddp: dict, prepares: bool, **more: object) -> Run:
    fails = bool(more.pop("fails", False))
    task = {"ddp": ddp, "prepares": prepares, "bf16": more.pop("bf16", False), "optimizer": more}
    return megatron.run([json.dumps(task)], ranks, main=MAIN, fails=fails)


@pytest.fixture(scope="module")
def alone(megatron: Megatron) -> Run:
    return run(megatron, 1, {}, False)


@pytest.mark.parametrize("is_told", [False, True], ids=["", "told"])
@pytest.mark.parametrize("ddp", [SHARDS, OVERLAP], ids=["shards", "overlap"])
def test_shards_train_as_one_rank(megatron: Megatron, alone: Run, ddp: dict, is_told: bool) -> None:
    """With and without the optimizer's own settings saying so."""
    told = (
        {"use_distributed_optimizer": True, "use_layer_wise_distributed_optimizer": True} if is_told else {}
    )
    if ddp is OVERLAP:
        told |= {"overlap_param_gather": True}
    sharded = run(megatron, 2, ddp, True, **told)
    assert worst_error(sharded, alone) < 1e-4
    first, second = sharded.saved("final")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_plain_ddp_trains_as_one_rank(megatron: Megatron, alone: Run) -> None:
    assert worst_error(run(megatron, 2, {}, False), alone) < 1e-4


@pytest.mark.parametrize("told", [{}, {"use_distributed_optimizer": True}], ids=["", "told"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_shards_that_nobody_prepared_are_refused(megatron: Megatron, told: dict, bf16: bool) -> None:
    """A rank has the sums of some gradients alone: with steps on all of them ranks would part silently."""
    refused = run(megatron, 2, SHARDS, False, fails=True, bf16=bf16, **told)
    assert refused.codes == [1, 1]
    assert "needs shards of whole matrices in DDP's buffers: call sso_megatron.mcore.prepare" in refused.log
