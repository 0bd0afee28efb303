"""Matrices cut over real process groups against one rank, by value, in every placement."""

import json
import math
from typing import Any

import pytest
import torch

import sso_megatron
from helpers.comparisons import worst_error
from helpers.megatron_runs import Megatron, Run
from helpers.numerics.cuts import MATRICES
from sso_megatron import SpectralConfig
from sso_megatron.optimizers.schedule import step_traffic
from sso_megatron.parallel.shards import even_cut

MODES = ["duplicated", "owner", "distributed", "auto"]
UNEVEN = {
    2: {"a": [20, 16, 0, [14, 6]], "b": [20, 16, 0, [20, 0]], "c": [20, 16, 0, [7, 13]]},
    3: {"a": [20, 16, 0, [14, 6, 0]], "b": [20, 16, 0, [0, 20, 0]], "c": [20, 16, 0, [5, 7, 8]]},
}


def train(megatron: Megatron, ranks: int, matrices: dict[str, Any], mode: str, **task: Any) -> Run:
    task = {"steps": 8, "gradients": "noise"} | task | {"matrices": matrices, "mode": mode}
    return megatron.run([json.dumps(task)], ranks, main="tasks.parallel:train")


@pytest.fixture(scope="module")
def one_rank(megatron: Megatron) -> dict[str, Run]:
    kinds = ("noise", "decaying")
    return {kind: train(megatron, 1, MATRICES, "duplicated", gradients=kind) for kind in kinds}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("gradients", ["noise", "decaying"])
def test_cut_matrices_follow_whole_ones(megatron, one_rank, ranks, mode, gradients) -> None:
    run = train(megatron, ranks, MATRICES, mode, gradients=gradients)
    # Float32 carries 1e-7; eight polynomials of degree five on singular values down to 1e-5 of the
    # norm magnify what is lost below them.
    assert worst_error(run, one_rank[gradients]) < 1e-4
    assert worst_error(run, one_rank[gradients], "retracted") < 1e-4
    for name, matrix in run.merged("retracted").items():
        radius = run.merged("radii")[name]
        m, n = MATRICES[name][:2]
        assert radius == pytest.approx(math.sqrt(m / n)), "the global shape's"
        norm = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
        assert norm == pytest.approx(radius, rel=1e-3)
    expected = {name: mode for name in MATRICES} | {"whole": "local"}
    if mode == "distributed":  # the others are shorter on the side that is cut, or squares cut by columns
        expected |= {name: "owner" for name, (m, n, dim, _) in MATRICES.items() if (m < n) != (dim == 1)}
        expected |= {"whole": "local"}
        assert set(expected.values()) == {"local", "owner", "distributed"}
    if mode != "auto":
        assert run.saved("modes") == [expected] * ranks
    else:
        assert len({json.dumps(modes) for modes in run.saved("modes")}) == 1, "the same on every rank"


@pytest.mark.parametrize("settings", [{"solver": "bisection"}, {"tangent": "project"}, {"tangent": "none"}])
def test_every_tangent_in_place(megatron, settings) -> None:
    runs = [train(megatron, n, MATRICES, "distributed", settings=settings) for n in (1, 2)]
    assert worst_error(runs[1], runs[0]) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_cuts(megatron, ranks, mode) -> None:
    """As many rows as it happens, none on some ranks: query heads where ranks outnumber groups."""
    single = train(megatron, 1, UNEVEN[ranks], mode)
    run = train(megatron, ranks, UNEVEN[ranks], mode)
    assert worst_error(run, single) < 1e-4
    assert worst_error(run, single, "retracted") < 1e-4


THIN = {"Spectra": {"rank_ratio": 0.1}, "SpectralAdam": {}}


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [(name, mode) for name in THIN for mode in MODES if (name, mode) != ("SpectralAdam", "owner")],
)
def test_shards_stay_where_products_are_thin(megatron, optimizer, mode) -> None:
    """Whatever dimension is cut; and what is kept of a matrix is whole, and the same in every layout."""
    task = {"optimizer": optimizer, "settings": THIN[optimizer]}
    for matrices, ranks in ((MATRICES, 2), (UNEVEN[2], 2), (UNEVEN[3], 3)):
        single, run = (train(megatron, n, matrices, mode, **task) for n in (1, ranks))
        assert worst_error(run, single) < 1e-4
        assert worst_error(run, single, "states") < 1e-4
        wanted = "distributed" if mode == "auto" else mode
        for modes in run.saved("modes"):
            assert {modes[name] for name, (_, _, dim, _) in matrices.items() if dim is not None} == {wanted}


def test_what_thin_products_move_is_counted(megatron) -> None:
    """Of a warm step, from shapes alone; a ring's all-reduce on two ranks brings each what it sums."""
    matrices = {f"layer {i}": [96, 64, i % 2, None] for i in range(4)}
    for optimizer in THIN:
        run = train(megatron, 2, matrices, "auto", steps=2, optimizer=optimizer)
        kind = getattr(sso_megatron, optimizer)([torch.nn.Parameter(torch.ones(2, 2))])
        cuts = [even_cut((m, n), dim, 2) for m, n, dim, _ in matrices.values()]
        counted = step_traffic(cuts, SpectralConfig(), kind)
        for steps in run.saved("collectives"):
            assert len(steps[1]) == counted.num_collectives
            assert [sum(size for _, size in steps[1])] * 2 == counted.received


@pytest.mark.parametrize("mode", MODES)
def test_missing_gradients_and_another_order_hang_nobody(megatron, one_rank, mode) -> None:
    """Ranks list shapes in opposite orders; a matrix without gradient stays as it is."""
    run = train(megatron, 2, MATRICES, mode, shuffle=True, without_gradient=["square", "layer 1"])
    start = train(megatron, 1, MATRICES, mode, without_gradient=list(MATRICES)).merged("final")
    final, wanted = run.merged("final"), one_rank["noise"].merged("final")
    for name in MATRICES:
        if name in ("square", "layer 1"):
            assert torch.equal(final[name], start[name])
        else:
            torch.testing.assert_close(final[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["duplicated", "owner", "distributed"])
def test_groups_of_the_same_ranks_meet(megatron, mode) -> None:
    run = megatron.run([json.dumps({"mode": mode})], 2, main="tasks.parallel:two_groups")
    assert run.merged("retracted").keys() == {"matrix 0", "matrix 1"}


@pytest.mark.parametrize("mode", ["duplicated", "owner", "distributed"])
def test_a_dead_weight_stops_every_rank(megatron, mode) -> None:
    run = megatron.run([json.dumps({"mode": mode})], 2, main="tasks.parallel:dead_weight")
    for error in run.saved("error"):
        assert error.startswith("matrix 2: a weight of spectral norm 0")


@pytest.mark.parametrize(
    ("ranks", "shape", "layers"),
    [(2, [6144, 2048, 0], 56), (3, [2048, 6144, 1], 28), (4, [14336, 4096, 0], 30)],
)
def test_owners_share_large_matrices_equally(megatron, ranks, shape, layers) -> None:
    """Shapes of 1.7B and 8B models, parted to the default workspace."""
    task = json.dumps({"shape": shape, "layers": layers})
    parts = megatron.run([task], ranks, main="tasks.parallel:parts_of_a_large_model").saved("parts")
    owned = [sum(here for _, _, here in batches) for batches in parts]
    assert sum(owned) == layers and max(owned) - min(owned) <= 1
    for batches in parts:
        assert {mode for mode, _, _ in batches} == {"owner"}
        assert all(size % ranks == 0 for _, size, _ in batches[:-1])


def test_blockwise_takes_shards_for_matrices(megatron) -> None:
    """The documented other result: what one rank makes of the two halves as matrices of their own."""
    whole = {"columns": [36, 24, 1, None]}
    run = train(megatron, 2, whole, "blockwise", steps=4)
    assert all(not step for step in run.saved("collectives")[0]), "no collective at all"
    assert run.saved("modes") == [{"columns[block0]": "local"}, {"columns[block1]": "local"}]
    for matrix in run.merged("retracted").values():
        assert matrix.shape == (36, 12)
        norm = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
        assert norm == pytest.approx(math.sqrt(36 / 12), rel=1e-3)


GATHER, EXCHANGE, SUM = "all_gather_into_tensor", "all_to_all_single", "all_reduce"


@pytest.mark.parametrize(
    ("mode", "first", "later"),
    [
        ("duplicated", [GATHER], [GATHER]),
        ("owner", [EXCHANGE, SUM, EXCHANGE], [EXCHANGE] * 2),
        ("distributed", [SUM] * 3, [SUM] * 2),
    ],
)
def test_collectives_are_as_many_for_two_layers_as_for_eight(megatron, mode, first, later) -> None:
    """The first step also looks at the weights for its caches."""
    bytes_by_layers = []
    for layers in (2, 8):
        matrices = {f"layer {i}": [36, 24, 0, None] for i in range(layers)}
        run = train(megatron, 2, matrices, mode, steps=3)
        for steps in run.saved("collectives"):
            assert [[kind for kind, _ in step] for step in steps] == [first, later, later]
        bytes_by_layers.append(sum(size for _, size in run.saved("collectives")[0][1]))
    if mode == "distributed":  # halves of two Gram matrices with both diagonals; a vector and a number
        assert bytes_by_layers == [layers * 8 * (24 * 25 + 25) for layers in (2, 8)]
    assert bytes_by_layers[1] == 4 * bytes_by_layers[0]
