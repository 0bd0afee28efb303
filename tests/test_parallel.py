"""Matrices cut over real process groups against one rank, by value, in every placement."""

import json
import math
from typing import Any

import pytest
import torch
from conftest import Megatron, Run

MODES = ["duplicated", "owner", "distributed", "auto"]
# Both dimensions, long and short side cut, square, several of a shape (more than ranks divide), whole.
MATRICES: dict[str, Any] = {
    "rows": [24, 36, 0, None],
    "tall rows": [48, 18, 0, None],
    "columns": [36, 24, 1, None],
    "short columns": [48, 12, 1, None],
    "square": [30, 30, 0, None],
    **{f"layer {i}": [24, 36, 0, None] for i in range(4)},
    "whole": [10, 14, None, None],
}
UNEVEN = {
    2: {"a": [16, 20, 0, [10, 6]], "b": [16, 20, 0, [16, 0]], "c": [16, 20, 0, [3, 13]]},
    3: {"a": [16, 20, 0, [10, 6, 0]], "b": [16, 20, 0, [0, 16, 0]], "c": [16, 20, 0, [3, 5, 8]]},
}


def train(megatron: Megatron, ranks: int, matrices: dict[str, Any], mode: str, **task: Any) -> Run:
    task = {"steps": 8, "gradients": "noise"} | task | {"matrices": matrices, "mode": mode}
    return megatron.run([json.dumps(task)], ranks, main="parallel_probes:train")


def worst_error(run: Run, reference: Run, name: str = "final") -> float:
    found, wanted = run.merged(name), reference.merged(name)
    assert found.keys() == wanted.keys()
    return max(
        (torch.linalg.norm(found[key] - value) / torch.linalg.norm(value)).item()
        for key, value in wanted.items()
    )


@pytest.fixture(scope="module")
def one_rank(megatron: Megatron) -> dict[str, Run]:
    kinds = ("noise", "decaying")
    return {kind: train(megatron, 1, MATRICES, "duplicated", gradients=kind) for kind in kinds}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("gradients", ["noise", "decaying"])
def test_cut_matrices_follow_whole_ones(megatron, one_rank, ranks, mode, gradients) -> None:  # type: ignore[no-untyped-def]
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
    expected = {"whole": "local"} | {name: mode for name in MATRICES if name != "whole"}
    if mode != "auto":
        assert run.saved("modes") == [expected] * ranks
    else:
        assert len({json.dumps(modes) for modes in run.saved("modes")}) == 1, "the same on every rank"


@pytest.mark.parametrize("settings", [{"solver": "bisection"}, {"tangent": "project"}, {"tangent": "none"}])
def test_every_tangent_in_place(megatron, settings) -> None:  # type: ignore[no-untyped-def]
    runs = [train(megatron, n, MATRICES, "distributed", settings=settings) for n in (1, 2)]
    assert worst_error(runs[1], runs[0]) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_cuts(megatron, ranks, mode) -> None:  # type: ignore[no-untyped-def]
    """As many rows as it happens, none on some ranks: query heads where ranks outnumber groups."""
    single = train(megatron, 1, UNEVEN[ranks], mode)
    run = train(megatron, ranks, UNEVEN[ranks], mode)
    assert worst_error(run, single) < 1e-4
    assert worst_error(run, single, "retracted") < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_missing_gradients_and_another_order_hang_nobody(megatron, one_rank, mode) -> None:  # type: ignore[no-untyped-def]
    """Ranks list shapes in opposite orders; a matrix without gradient stays as it is."""
    run = train(megatron, 2, MATRICES, mode, shuffle=True, without_gradient=["square", "layer 1"])
    start = train(megatron, 1, MATRICES, mode, without_gradient=list(MATRICES)).merged("final")
    final, wanted = run.merged("final"), one_rank["noise"].merged("final")
    for name in MATRICES:
        if name in ("square", "layer 1"):
            assert torch.equal(final[name], start[name])
        else:
            torch.testing.assert_close(final[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_blockwise_takes_shards_for_matrices(megatron) -> None:  # type: ignore[no-untyped-def]
    """The documented other result: what one rank makes of the two halves as matrices of their own."""
    whole = {"columns": [36, 24, 1, None]}
    run = train(megatron, 2, whole, "blockwise", steps=4)
    assert all(not step for step in run.saved("collectives")[0]), "no collective at all"
    assert run.saved("modes") == [{"columns[block0]": "local"}, {"columns[block1]": "local"}]
    for matrix in run.merged("retracted").values():
        assert matrix.shape == (36, 12)
        norm = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
        assert norm == pytest.approx(math.sqrt(36 / 12), rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("duplicated", ["all_gather_into_tensor"]),
        ("owner", ["all_to_all_single"] * 2),
        ("distributed", ["all_reduce"] * 3),
    ],
)
def test_collectives_are_as_many_for_two_layers_as_for_eight(megatron, mode, kinds) -> None:  # type: ignore[no-untyped-def]
    bytes_by_layers = []
    for layers in (2, 8):
        matrices = {f"layer {i}": [24, 36, 0, None] for i in range(layers)}
        run = train(megatron, 2, matrices, mode, steps=3)
        for steps in run.saved("collectives"):
            # The first step also looks at the weights for its caches.
            assert [kind for kind, _ in steps[0]] == kinds[: len(kinds) // 3] + kinds
            assert [[kind for kind, _ in step] for step in steps[1:]] == [kinds] * 2
        bytes_by_layers.append(sum(size for _, size in run.saved("collectives")[0][1]))
    assert bytes_by_layers[1] == 4 * bytes_by_layers[0]
