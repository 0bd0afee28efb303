"""``--use-distributed-optimizer``: whole matrices on data-parallel ranks, compared with one rank."""

import math

import pytest
import torch

from helpers.megatron_runs import MOE, Megatron, Run, assert_same_run, tiny
from helpers.runs import summation_order

BASE = ["--spectral-mup-init", "--train-iters", "10", "--clip-grad", "0.5", "--log-num-zeros-in-grad"]
SHARDED = ["--use-distributed-optimizer"]
OVERLAP = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "20000"]
WATCH = ("probes:weights", "probes.layer_wise:steps")
WATCH_SHARDS = (*WATCH, "probes.layer_wise:shards", "probes.layer_wise:buffers")


def assert_sharded(run: Run) -> None:
    """Each matrix on one data-parallel rank, collectives by buffer, equal replicas."""
    places, all_owned = run.saved("place"), run.saved("owned")
    homes: dict[str, set[tuple[int, ...]]] = {}
    for place, owned in zip(places, all_owned, strict=True):
        for name, is_expert in owned.items():
            axes = ("pp", "ep", "edp") if is_expert else ("pp", "dp")
            homes.setdefault(name, set()).add(tuple(place[axis] for axis in axes))
    assert homes.keys() == run.merged("final").keys()
    assert all(len(ranks) == 1 for ranks in homes.values())
    kinds = {kind for counted in run.saved("collectives") for kind in counted}
    for whose in {whose for _, _, whose in kinds}:
        found = {(collective, what) for collective, what, of in kinds if of == whose}
        assert found == {("reduce_scatter", "gradients"), ("all_gather", "parameters")}, whose
    assert ("reduce_scatter", "gradients", "matrices") in kinds
    replicas: dict[tuple[object, ...], torch.Tensor] = {}
    for place, model in zip(places, run.saved("model"), strict=True):
        for name, value in model.items():
            axes = ("pp", "ep", "etp") if "local_experts" in name else ("pp", "tp")
            first = replicas.setdefault((name, *(place[axis] for axis in axes)), value)
            assert torch.equal(value, first), name


def assert_same_steps(run: Run, reference: Run) -> None:
    """Gradient norm, zeros and loss scale that every rank got from every step are those of one rank."""
    (wanted,) = reference.saved("steps")
    for seen in run.saved("steps"):
        assert len(seen) == len(wanted)
        for got, expected in zip(seen, wanted, strict=True):
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert got["zeros"] == pytest.approx(expected["zeros"], rel=1e-2)  # by rounding
            assert got["success"] and got["scale"] == 1.0


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Run:
    run = megatron.train(tiny(*BASE), calls=WATCH)
    (steps,) = run.saved("steps")
    assert all(step["grad_norm"] > 0.5 for step in steps), "clipping has its effect"
    return run


@pytest.mark.parametrize(
    ("ranks", "tp", "flags"),
    [
        (2, 1, SHARDED),
        (2, 1, OVERLAP),
        (4, 2, SHARDED),
        (4, 1, [*SHARDED, "--pipeline-model-parallel-size", 2]),
    ],
    ids=["dp2", "dp2-overlap", "tp2-dp2", "pp2-dp2"],
)
def test_dense(megatron, dense, ranks, tp, flags) -> None:
    run = megatron.train(tiny(*BASE, *flags, tp=tp), ranks, calls=WATCH_SHARDS)
    assert_same_run(run, dense)
    assert_same_steps(run, dense)
    assert_sharded(run)
    assert run.summary["max_radius_error"] <= 1e-3


def test_gradients_are_clipped_alike_without_it(megatron, dense) -> None:
    run = megatron.train(tiny(*BASE, tp=2), 4, calls=WATCH)
    assert_same_run(run, dense)
    assert_same_steps(run, dense)


@pytest.fixture(scope="module")
def bf16(megatron: Megatron) -> tuple[Run, list[Run]]:
    """One rank's run, and the same with sums in other orders."""
    argv = tiny(*BASE, "--bf16")
    return megatron.train(argv, calls=summation_order.WATCH), summation_order.reordered(megatron, argv)


@pytest.mark.parametrize("flags", [SHARDED, OVERLAP], ids=["dp2", "dp2-overlap"])
def test_bf16(megatron, bf16, flags) -> None:
    calls = (*WATCH_SHARDS, "probes.rounding:first_steps")
    run = megatron.train(tiny(*BASE, "--bf16", *flags), 2, calls=calls)
    summation_order.assert_within_rounding(run, *bf16)
    assert_sharded(run)
    assert run.summary["max_radius_error"] <= 1e-3


@pytest.fixture(scope="module")
def moe(megatron: Megatron) -> Run:
    return megatron.train(tiny(*MOE, *BASE), calls=WATCH)


@pytest.mark.parametrize(
    ("ranks", "tp", "flags"),
    [
        (2, 1, []),
        (4, 1, ["--expert-model-parallel-size", 2, "--micro-batch-size", 1]),
        # One dense data-parallel rank, two of the experts.
        (2, 2, ["--expert-tensor-parallel-size", 1, "--sequence-parallel"]),
    ],
    ids=["dp2", "ep2-dp2", "tp2-etp1"],
)
def test_experts(megatron, moe, ranks, tp, flags) -> None:
    run = megatron.train(tiny(*MOE, *BASE, *SHARDED, *flags, tp=tp), ranks, calls=WATCH_SHARDS)
    assert_same_run(run, moe)
    assert_same_steps(run, moe)
    assert_sharded(run)
    kinds = {kind for counted in run.saved("collectives") for kind in counted}
    assert (("reduce_scatter", "gradients", "experts' matrices") in kinds) == bool(flags)


def test_excluded_experts_go_to_adamw(megatron) -> None:
    """Sharded over the experts' own group; Megatron's factory asserts there."""
    argv = [*MOE, *BASE, "--spectral-exclude", "local_experts", "linear_proj"]
    single = megatron.train(tiny(*argv), calls=WATCH)
    ep2 = ["--expert-model-parallel-size", 2, "--micro-batch-size", 1]
    run = megatron.train(tiny(*argv, *SHARDED, *ep2), 4, calls=WATCH_SHARDS)
    assert_same_run(run, single)
    assert_same_steps(run, single)
    assert_sharded(run)
    assert not any("local_experts" in name or "linear_proj" in name for name in run.merged("final"))
    assert ("reduce_scatter", "gradients", "experts' others") in run.saved("collectives")[0]


def test_ranks_without_a_matrix(megatron) -> None:
    """Two matrices for four ranks; two of them have only AdamW's shards."""
    argv = [*BASE, "--num-layers", 1, "--spectral-exclude", "mlp"]
    single = megatron.train(tiny(*argv), calls=WATCH)
    run = megatron.train(tiny(*argv, *SHARDED, "--micro-batch-size", 1), 4, calls=WATCH_SHARDS)
    assert_same_run(run, single)
    assert_same_steps(run, single)
    assert_sharded(run)
    assert sorted(map(len, run.saved("owned"))) == [0, 0, 1, 8]


def test_nothing_is_left_for_the_spectral_optimizer(megatron) -> None:
    argv = tiny("--spectral-exclude", ".", *SHARDED)
    assert len(megatron.train(argv, 2).losses) == 4


def test_a_model_that_was_not_routed(megatron) -> None:
    """Without the error all its matrices would go to AdamW."""
    run = megatron.run(tiny(*SHARDED), 2, calls=("probes.layer_wise:do_not_route",), fails=True)
    assert run.codes == [2, 2]
    assert "needs shards of whole matrices in DDP's buffers" in run.log


def test_learned_positions_go_to_adamw(megatron) -> None:
    """Megatron's rule would lay them out among the matrices."""
    argv = [*BASE, "--position-embedding-type", "learned_absolute"]
    single = megatron.train(tiny(*argv), calls=WATCH)
    run = megatron.train(tiny(*argv, *SHARDED), 2, calls=WATCH_SHARDS)
    assert_same_run(run, single)
    assert_sharded(run)


def test_a_script_with_a_model_provider(megatron, dense) -> None:
    """Megatron's other way to build a model."""
    argv = [*tiny(*BASE, *SHARDED), "--spectral-run-dir", "."]
    run = megatron.run(argv, 2, calls=WATCH_SHARDS, main="probes.layer_wise:their_script")
    assert_same_run(run, dense)
    assert_sharded(run)


def test_interleaved_pipeline(megatron) -> None:
    """All buckets of a later model chunk are one group, which is gathered when everything has stepped."""
    freeze = ("probes.layer_wise:freeze_input_norms",)
    argv = [*BASE, "--num-layers", 4]
    single = megatron.train(tiny(*argv), calls=(*freeze, *WATCH))
    argv += ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
    run = megatron.train(tiny(*argv, *SHARDED, "--micro-batch-size", 1), 4, calls=(*freeze, *WATCH_SHARDS))
    assert_same_run(run, single)
    assert_same_steps(run, single)
    assert_sharded(run)


FROZEN = {
    "0.decoder.layers.0.mlp.linear_fc1.weight",
    "0.decoder.layers.0.mlp.linear_fc2.weight",
    "0.decoder.layers.1.self_attention.linear_qkv.weight",
}


def test_frozen_matrices(megatron) -> None:
    calls = ("probes.layer_wise:freeze_matrices", "probes.layer_wise:groups", *WATCH)
    single = megatron.train(tiny(*BASE), calls=calls)
    run = megatron.train(tiny(*BASE, *SHARDED, tp=2), 4, calls=calls)
    assert_same_run(run, single)
    assert_same_steps(run, single)
    for r in (single, run):
        for before, after, groups in zip(*map(r.saved, ("before", "after", "groups")), strict=True):
            assert {name for name in before if torch.equal(before[name], after[name])} == FROZEN
            assert not {f"0.{name}" for name in groups} & FROZEN


def test_a_stage_without_a_matrix_to_train(megatron) -> None:
    freeze = ("probes.layer_wise:freeze_last_layer",)
    argv = [*BASE, "--pipeline-model-parallel-size", 2]
    plain = megatron.train(tiny(*argv), 2, calls=(*freeze, *WATCH))
    run = megatron.train(tiny(*argv, *OVERLAP), 4, calls=(*freeze, *WATCH_SHARDS))
    assert_same_run(run, plain)
    assert_sharded(run)


def test_decoupled_learning_rate(megatron) -> None:
    """For embeddings and output layer; the matrices keep theirs."""
    argv = tiny(*SHARDED, "--decoupled-lr", "3e-2")
    groups = megatron.train(argv, 2, calls=("probes.layer_wise:groups",)).merged("groups")
    for name, group in groups.items():
        is_vocabulary = "embedding" in name or "output_layer" in name
        assert group["max_lr"] == (3e-2 if is_vocabulary else 1e-2), name


@pytest.mark.parametrize("optimizer", ["sso", "muon_sphere"])
def test_mup(megatron, optimizer) -> None:
    """Width 64 over a base of 32: AdamW's matrices as under Adam, spectral ones scale by their radius."""
    argv = [*BASE, "--use-mup", "--mup-base-hidden-size", 32, "--spectral-exclude", "linear_proj"]
    calls = (*WATCH, "probes.layer_wise:groups")
    single = megatron.train(tiny(*argv, optimizer=optimizer), calls=calls)
    run = megatron.train(tiny(*argv, *SHARDED, optimizer=optimizer), 2, calls=calls)
    assert_same_run(run, single)
    for r in (single, run):
        for name, group in r.merged("groups").items():
            scale = 0.5 if "linear_proj" in name else 1.0
            assert group["max_lr"] == pytest.approx(scale * 1e-2), name
            if group["class"] is torch.optim.AdamW:
                assert group["eps"] == pytest.approx(scale * 1e-8), name


def test_layout_of_real_models(megatron: Megatron) -> None:
    """Shards are whole, aligned and no larger than by size alone; work is spread evenly."""
    run = megatron.run([], main="probes.layer_wise:balance")
    (found,) = run.saved("balance")
    for (model, num_shards, bucket_size, who), layout in found.items():
        if who == "theirs":
            continue
        theirs = found[model, num_shards, bucket_size, "theirs"]
        assert layout["shards"] == num_shards
        assert layout["unpadded"] == theirs["unpadded"], "the same buckets"
        for (start, end), (first, last) in zip(layout["buckets"], theirs["buckets"], strict=True):
            assert end - start <= last - first
        ends = 0
        for start, end, _, first, last in sorted(layout["places"]):
            assert start % 64 == 0 and first <= start and end <= last and start >= ends
            ends = end
        numels = [end - start for start, end, *_ in layout["places"]]
        assert numels == layout["numels"]
        order = [bucket for _, _, bucket, *_ in reversed(layout["places"])]
        assert order == sorted(order), "buckets fill in the order of the backward pass"
        assert layout["cost"] <= theirs["cost"] + 1e-9
        if num_shards <= 8:
            assert layout["cost"] <= 1.03, (model, num_shards, bucket_size)
    assert found["dense", 8, 40_000_000, "theirs"]["cost"] > 1.2
    assert math.isclose(found["dense", 8, 40_000_000, "ours"]["cost"], 1.0, abs_tol=2e-3)
