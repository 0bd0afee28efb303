"""Real Megatron models, trained over real process groups, compared by value with one rank."""

import math
import re

import pytest
import torch

from helpers.megatron_runs import MOE, Megatron, Run, assert_same_run, tiny


@pytest.fixture(scope="module")
def one_rank(megatron: Megatron) -> dict[str, Run]:
    """Twenty iterations on one rank, dense, for each optimizer."""
    flags = ["--spectral-mup-init", "--train-iters", "20"]
    return {
        name: megatron.train(tiny(*flags, optimizer=name), calls=("probes:weights",))
        for name in ("sso", "muon_sphere")
    }


def test_bisection_on_two_ranks(megatron, one_rank) -> None:
    argv = ["--spectral-mup-init", "--train-iters", "20", "--sso-solver", "bisection"]
    runs = [megatron.train(tiny(*argv, tp=tp), tp, calls=("probes:weights",)) for tp in (1, 2)]
    assert_same_run(runs[1], runs[0])
    # The two solvers find the same root: the runs stay together.
    assert_same_run(runs[0], one_rank["sso"], losses=1e-3, weights=2e-2)


def test_tied_embeddings_over_two_stages(megatron) -> None:
    argv = tiny("--spectral-mup-init", "--train-iters", "6")
    argv.remove("--untie-embeddings-and-output-weights")
    single = megatron.train(argv, calls=("probes:weights",))
    stages = megatron.train([*argv, "--pipeline-model-parallel-size", "2"], 2, calls=("probes:weights",))
    assert_same_run(stages, single)


@pytest.mark.parametrize("flags", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_both_copies_of_a_tied_embedding_take_the_same_clipped_steps(megatron, flags) -> None:
    """Each stage steps on its own copy, by a name of its own."""
    stages = ["--pipeline-model-parallel-size", 2]
    argv = tiny(*stages, *flags, "--train-iters", 6, optimizer="spectra_clip_adamw")
    argv.remove("--untie-embeddings-and-output-weights")
    run = megatron.train(argv, 2, calls=("probes:weights",))
    initial, final = run.merged("initial"), run.merged("final")
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    assert torch.equal(final[names[0]], final[names[1]])
    assert not torch.equal(final[names[0]], initial[names[0]])


def test_validation_loss_is_the_last_one_over_two_stages(megatron) -> None:
    """Only the last stage knows it; evaluations inside the run must not outlast the closing one."""
    argv = tiny("--pipeline-model-parallel-size", 2, "--eval-interval", 2, "--eval-iters", 1)
    run = megatron.train(argv, 2)
    printed = re.findall(r"on (validation|test) set \| lm loss value: (\S+)", run.log)
    assert [which for which, _ in printed] == ["validation", "test"]
    assert run.summary["val_loss"] == pytest.approx(float(printed[0][1]), rel=1e-6)


def test_initial_weights_do_not_depend_on_the_layout(one_rank, megatron) -> None:
    initial = one_rank["sso"].merged("initial")
    for ranks, tp, flags in ((2, 2, []), (2, 1, ["--pipeline-model-parallel-size", "2"])):
        argv = tiny("--spectral-mup-init", "--lr-warmup-iters", 0, "--train-iters", 1, *flags, tp=tp)
        found = megatron.run(argv, ranks, calls=("probes:weights",)).merged("initial")
        assert found.keys() == initial.keys()
        for name, weight in initial.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    for name, weight in initial.items():
        norm = torch.linalg.svdvals(weight.double())[0].item()
        assert abs(norm / math.sqrt(weight.shape[0] / weight.shape[1]) - 1) < 1e-3, name


def test_trained_weights_are_on_the_sphere(one_rank) -> None:
    """Every logical matrix after a retraction, by exact SVD; and the summary says the same."""
    for run in one_rank.values():
        worst = 0.0
        for weight, radius in run.merged("retracted").values():
            assert radius == pytest.approx(math.sqrt(weight.shape[0] / weight.shape[1]))
            norm = torch.linalg.svdvals(weight.double())[0].item()
            worst = max(worst, abs(norm - radius) / radius)
        assert worst <= 1e-3
        assert run.summary["max_radius_error"] == pytest.approx(worst, abs=1e-6)


ATTENTION = [f"decoder.layers.{i}.self_attention" for i in (0, 1)]
MLP = [f"decoder.layers.{i}.mlp" for i in (0, 1)]
EXPECTED_MATRICES = {
    **{f"{layer}.linear_qkv.weight[q{head}]": (16, 64) for layer in ATTENTION for head in range(4)},
    **{
        f"{layer}.linear_qkv.weight[{kv}]": (16, 64)
        for layer in ATTENTION
        for kv in ("k0", "k1", "v0", "v1")
    },
    **{f"{layer}.linear_proj.weight": (64, 64) for layer in ATTENTION},
    **{f"{layer}.linear_fc1.weight[{half}]": (96, 64) for layer in MLP for half in ("gate", "up")},
    **{f"{layer}.linear_fc2.weight": (64, 96) for layer in MLP},
}


@pytest.mark.parametrize(
    ("ranks", "tp", "flags"),
    [
        (1, 1, []),
        (2, 2, []),
        (2, 1, ["--pipeline-model-parallel-size", "2"]),
        (1, 1, ["--bf16"]),
        (2, 2, ["--bf16"]),
    ],
    ids=["one", "tp2", "pp2", "bf16", "tp2-bf16"],
)
def test_every_logical_matrix_is_found(megatron, ranks, tp, flags) -> None:
    """Names and global shapes; in bf16 they are found through the fp32 master weights."""
    run = megatron.run(tiny(*flags, tp=tp), ranks, calls=("probes:settings",))
    matrices: dict[str, tuple[int, int]] = {}
    for part in run.saved("settings"):
        matrices |= part["matrices"]
        assert part["dtypes"] == {"torch.float32"}
    assert matrices == EXPECTED_MATRICES


def test_everything_else_goes_to_adamw(megatron) -> None:
    routes = megatron.run(tiny(*MOE), calls=("probes:settings",)).saved("settings")[0]["routes"]
    for name, optimizer in routes.items():
        is_matrix = "linear" in name or "router" in name
        is_matrix &= "norm" not in name
        assert optimizer == ("SSO" if is_matrix else "AdamW"), name


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("duplicated", ["all_gather_into_tensor"] * 3),
        ("owner", ["all_to_all_single"] * 2),
        # The output projection is a square cut by columns: it goes to owners.
        ("distributed", ["all_reduce"] * 4 + ["all_to_all_single"] * 2),
        ("auto", ["all_to_all_single"] * 2),
    ],
)
def test_collectives_do_not_grow_with_layers(megatron, mode, kinds) -> None:
    """Gate and up, down, output projection: three batches, but for owners one exchange, there and back."""
    num_bytes = []
    for layers in (2, 8):
        argv = tiny("--num-layers", layers, "--train-iters", 3, "--spectral-tp-mode", mode, tp=2)
        run = megatron.run(argv, 2, calls=("probes:count_collectives",))
        for steps in run.saved("collectives"):
            assert [[kind for kind, _ in step] for step in steps[1:]] == [kinds] * 2
        num_bytes.append(sum(size for _, size in run.saved("collectives")[0][1]))
    assert num_bytes[1] == 4 * num_bytes[0]


def test_the_command_line_wins_over_a_checkpoint(megatron) -> None:
    argv = tiny("--train-iters", 12, tp=2)
    save = ["--save", "ckpt", "--save-interval", "6", "--exit-interval", "6"]
    first = megatron.train([*argv, *save], 2)
    assert first.summary["max_radius_error"] is None, "stopped early: nothing was measured"
    load = ["--load", str(first.folder / "ckpt")]
    other = ["--sso-momentum", "0.5", "--sso-weight-decay", "0.01", *load]
    third = megatron.run([*argv, *other], 2, calls=("probes:settings",))
    config = third.saved("settings")[0]["config"]
    assert (config["momentum"], config["weight_decay"]) == (0.5, 0.01)
