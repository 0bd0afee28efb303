"""All cut matrices in one exchange: where they go, what that moves and takes, and that nothing changes."""

import itertools
import json
import math
from typing import Any

import pytest
import torch

from helpers.megatron_runs import Megatron, Run
from helpers.tasks.exchange import Descent, shard
from sso_megatron import SSO, SpectralConfig
from sso_megatron.optimizers.schedule import step_traffic
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.plan import CutMatrix, GroupPlan, plan_group
from sso_megatron.parallel.shards import Cut, even_cut

WORK = PolarWork(num_trials=2, num_steps=8)
FEW = {"msign_steps": 2, "solver_trials": 2}  # for tests of what does not depend on it


def algorithm(**settings: Any) -> SSO:
    """For its needs."""
    return SSO([torch.nn.Parameter(torch.ones(1, 1))], **settings)


def dense(hidden: int, layers: int, tp: int) -> list[Cut]:
    """What tensor parallelism cuts of a model like Dense 1.7B, in the order of the names."""
    one = [
        *[even_cut((3 * hidden, hidden), 0, tp)] * 2,
        even_cut((hidden, 3 * hidden), 1, tp),
        even_cut((hidden, hidden), 1, tp),
    ]
    return one * layers


def planned(cuts: list[Cut], workspace: int, mode: str = "owner", copies: int = 3) -> GroupPlan:
    def need(cut: Cut) -> int:
        return copies * 4 * cut.shape[0] * cut.shape[1]

    matrices = [CutMatrix(cut, cut.shape, 4, need(cut), need(cut)) for cut in cuts]
    tp = len(cuts[0].lengths)
    return plan_group(matrices, tp, mode=mode, workspace=workspace, work=WORK, flops_per_byte=200.0)


def step(megatron: Megatron, ranks: int, **task: Any) -> Run:
    return megatron.run([json.dumps(task)], ranks, main="tasks.exchange:dense")


def received(run: Run, ranks: int) -> list[float]:
    """Bytes that each rank received from others in the last step."""
    factors = {
        "all_to_all_single": 1.0,  # a rank sends nothing to itself
        "all_gather_into_tensor": (ranks - 1) / ranks,
        "all_reduce": 2 * (ranks - 1) / ranks,
    }
    return [sum(factors[kind] * size for kind, size in calls) for calls in run.saved("collectives")]


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
@pytest.mark.parametrize("mib", [1, 4, 64])
def test_every_matrix_has_its_owner_and_its_round(tp: int, mib: int) -> None:
    cuts = dense(96, 7, tp)
    exchange = planned(cuts, mib << 20).exchange
    assert exchange is not None
    batches = list(itertools.chain(*exchange.rounds))
    assert sorted(itertools.chain(*batches)) == list(range(len(cuts)))
    work = [0.0] * tp
    for i, owner in exchange.owners.items():
        work[owner] += WORK.flops(cuts[i].shape)
    assert max(work) - min(work) <= max(WORK.flops(cut.shape) for cut in cuts)
    for batch in batches:
        assert len({cuts[i].shape for i in batch}) == 1
        owners = [exchange.owners[i] for i in batch]
        assert owners == sorted(owners), "an owner's matrices stand together"


@pytest.mark.parametrize("mib", [2, 3, 5, 8, 13, 100])
@pytest.mark.parametrize("uneven", [False, True])
def test_rounds_stay_within_the_workspace(mib: int, uneven: bool) -> None:
    """Reckoned from the parcels themselves, on every rank, before, during and after each round."""
    cuts = dense(128, 5, 4)
    if uneven:
        cuts += [Cut((128, 512), 0, rows) for rows in ((100, 28, 0, 0), (0, 0, 1, 127), (32, 32, 32, 32))]
    exchange = planned(cuts, mib << 20).exchange
    assert exchange is not None
    ranks = range(4)

    def bytes_of(boundary: int, rank: int, sends: bool) -> int:
        ends = [(rank, peer) if sends else (peer, rank) for peer in ranks]
        return 4 * sum(exchange.numel(piece) for a, b in ends for piece in exchange.parcel(boundary, a, b))

    for boundary, rank in itertools.product(range(len(exchange.rounds) + 1), ranks):
        sent, got = (bytes_of(boundary, rank, sends) for sends in (True, False))
        before = bytes_of(boundary - 1, rank, False) if boundary else 0
        assert max(before + sent, sent + got) <= exchange.staged <= mib << 20
        for batch in exchange.rounds[boundary] if boundary < len(exchange.rounds) else []:
            mine = [i for i in batch if exchange.owners[i] == rank]
            assert got + sum(exchange.matrices[i].workspace for i in mine) <= mib << 20


def test_a_matrix_that_does_not_fit_goes_alone() -> None:
    exchange = planned(dense(512, 2, 2), 1 << 20).exchange
    assert exchange is not None
    for (batch,) in exchange.rounds:
        assert len(batch) <= 2, "one for each owner"


def test_owners_share_out_all_shapes_together() -> None:
    """One layer over four ranks: each shape alone would leave three of them idle, all of them none."""
    plan = planned(dense(2048, 1, 4), 512 << 20, mode="auto")
    assert plan.exchange is not None and not plan.batches
    assert sorted(plan.exchange.owners.values()) == [0, 1, 2, 3]
    # One long matrix is cheaper where it lies, whatever there is beside it.
    plan = planned([*dense(2048, 4, 4), even_cut((262144, 1024), 0, 4)], 1 << 40, mode="auto")
    assert plan.batches == [("distributed", [16])]
    assert plan.exchange is not None and len(plan.exchange.owners) == 16


def test_dense_1_7b_over_four_ranks() -> None:
    cuts = dense(2048, 28, 4)
    auto = step_traffic(cuts, SpectralConfig(tp_mode="auto"), algorithm())
    duplicated = step_traffic(cuts, SpectralConfig(tp_mode="duplicated"), algorithm())
    assert auto.num_collectives <= 16
    assert max(auto.received) <= min(duplicated.received) / 2
    numel = sum(math.prod(cut.shape) for cut in cuts)
    assert auto.received == [3 * numel // 4 * 3 // 4 * 4] * 4, "weight and direction there, the result back"
    assert duplicated.received == [2 * numel * 3 // 4 * 4] * 4


# ---------------------------------------------------------------- steps, over real processes


@pytest.fixture(scope="module")
def one_rank(megatron: Megatron) -> dict[str, torch.Tensor]:
    return step(megatron, 1, hidden=64, layers=12, groups=2).merged("final")


@pytest.mark.parametrize(
    ("mode", "ranks", "mib"),
    [
        *[("owner", 2, 1), ("owner", 4, 1), ("owner", 4, 512)],
        *[("duplicated", 4, 1), ("distributed", 4, 1)],
    ],
)
def test_steps_equal_one_rank_bit_for_bit(megatron, one_rank, mode, ranks, mib) -> None:
    """Several shapes, both dimensions, two groups with their own rates; in many rounds and in one."""
    run = step(megatron, ranks, hidden=64, layers=12, groups=2, workspace_mib=mib, mode=mode)
    for rank, found in enumerate(run.saved("final")):
        for name, value in found.items():
            assert torch.equal(value, shard(name.rpartition(".")[2], one_rank[name], rank, ranks)), name
    num_calls = len(run.saved("collectives")[0])
    if mode == "owner":
        assert num_calls >= 4 if mib == 1 else num_calls == 2


def test_rounds_do_not_change_sso(megatron: Megatron) -> None:
    """To rounding: batches of another size may sum in another order."""
    finals = []
    for mib in (2, 512):
        run = step(megatron, 2, hidden=128, layers=4, workspace_mib=mib, steps=3, settings=FEW)
        finals.append(run.saved("final"))
    for few, many in zip(*finals, strict=True):
        for name in few:
            torch.testing.assert_close(few[name], many[name], rtol=1e-4, atol=1e-5)


def test_fewer_matrices_than_ranks_and_none_with_a_gradient(megatron: Megatron) -> None:
    names = ["layers.0.proj", "layers.1.proj"]
    for without in ([], names[:1], names):
        task = {"hidden": 64, "layers": 2, "names": ["proj"], "without_gradient": without}
        single = step(megatron, 1, **task).merged("final")
        run = step(megatron, 4, **task)
        for rank, found in enumerate(run.saved("final")):
            for name in names:
                assert torch.equal(found[name], shard("proj", single[name], rank, 4))


@pytest.mark.parametrize("mode", ["owner", "duplicated", "distributed"])
def test_groups_that_share_ranks_meet(megatron: Megatron, mode: str) -> None:
    run = megatron.run([json.dumps({"mode": mode})], 4, main="tasks.exchange:two_groups")
    gen = torch.Generator().manual_seed(0)
    for i in range(24):
        whole = torch.randn(128, 192, generator=gen)
        group = range(4) if i % 3 == 0 else [(0, 1), (2, 3)][i % 3 - 1]
        value = torch.nn.Parameter(whole.clone())
        value.grad = whole.cos()
        alone = Descent([value], 0.1)
        for _ in range(2):
            alone.step()
        finals = run.saved("final")
        found = torch.cat([finals[rank][f"matrix {i}"] for rank in group])
        assert torch.equal(found, value)


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [("owner", 2), ("owner", 4), ("duplicated", 2), ("distributed", 2), ("auto", 3)],
)
def test_traffic_is_what_was_counted(megatron: Megatron, mode: Any, ranks: int) -> None:
    task = {"hidden": 96, "layers": 5, "names": ["fc1", "fc2", "proj"], "mode": mode, "workspace_mib": 1}
    run = step(megatron, ranks, **task, settings=FEW)
    shared = SpectralConfig(tp_mode=mode, workspace_mib=1)
    counted = step_traffic(dense(96, 5, ranks), shared, algorithm(**FEW))
    assert [len(calls) for calls in run.saved("collectives")] == [counted.num_collectives] * ranks
    assert received(run, ranks) == counted.received


def test_dense_1_7b_scaled_down(megatron: Megatron) -> None:
    """A sixteenth of the hidden size, and a workspace in proportion."""
    settings = FEW | {"tangent": "none"}
    run = step(megatron, 4, hidden=128, layers=28, workspace_mib=2, mode="auto", settings=settings)
    assert {mode for mode, *_ in run.saved("batches")[0]} == {"owner", "local"}
    assert all(len(calls) <= 16 for calls in run.saved("collectives"))
    shared = SpectralConfig(tp_mode="duplicated", workspace_mib=2)
    duplicated = step_traffic(dense(128, 28, 4), shared, algorithm(**settings))
    assert max(received(run, 4)) <= min(duplicated.received) / 2


@pytest.mark.parametrize(
    ("mode", "ranks", "mib"),
    [
        *[("owner", 1, 4), ("owner", 1, 9), ("owner", 2, 5), ("owner", 4, 4), ("owner", 4, 16)],
        *[("duplicated", 2, 6), ("distributed", 2, 3)],
    ],
)
def test_memory_stays_within_the_workspace(megatron: Megatron, mode: str, ranks: int, mib: int) -> None:
    """Of a step that takes nothing beside weights and directions: what staging and batching make of it."""
    task = {"hidden": 256, "layers": 6, "workspace_mib": mib, "mode": mode}
    run = step(megatron, ranks, **task, measures_memory=True)
    for peaks in run.saved("peaks"):
        assert 0.3 * (mib << 20) < max(peaks) <= mib << 20


@pytest.mark.parametrize(
    ("ranks", "mib", "mode", "solver"),
    [
        *[(1, 2, "owner", "tracking"), (1, 2, "owner", "bisection"), (1, 8, "owner", "bisection")],
        *[(2, 4, "owner", "tracking"), (2, 4, "distributed", "bisection")],
        *[(4, 2, "owner", "bisection"), (4, 2, "distributed", "tracking")],
    ],
)
def test_sso_stays_within_the_workspace(
    megatron: Megatron, ranks: int, mib: int, mode: str, solver: str
) -> None:
    """In the first step, too, which finds what later steps go on from."""
    settings = FEW | {"solver": solver}
    task = {"hidden": 128, "layers": 4, "workspace_mib": mib, "settings": settings, "mode": mode}
    run = step(megatron, ranks, **task, measures_memory=True)
    for peaks in run.saved("peaks"):
        assert max(peaks) <= mib << 20


@pytest.mark.parametrize("ranks", [1, 4])
def test_parameters_are_reported_once_and_early(megatron: Megatron, ranks: int) -> None:
    without = ["layers.0.qkv", "layers.3.proj"]
    run = step(megatron, ranks, hidden=64, layers=12, workspace_mib=1, without_gradient=without)
    for finished in run.saved("finished"):
        assert isinstance(finished, list)
        names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("qkv", "proj", "fc1", "fc2")]
        assert sorted(finished) == sorted(names)
        for kind in ("proj", "fc1", "fc2"):
            order = [name for name in finished if name.endswith(kind)]
            halves = [set(order[:6]), {f"layers.{i}.{kind}" for i in range(6)}]
            assert len(halves[0] & halves[1]) >= 4, order
