"""What a run measures of itself: by exact singular values, the same in every layout, and at what price."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import oracle
from helpers.megatron_runs import FAMILY, MOE, Megatron, Run, tiny
from helpers.runs.layouts import DIST, EP2, PP2, SP, VPP2
from helpers.runs.measured import assert_same_measures, measured, records
from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.runs.tables import Table
from sso_megatron.runs.writer import RunFiles

EVERY = ["--log-spectral-metrics", 1]


# ---------------------------------------------------------------- by exact singular values


def exact(before: Tensor, after: Tensor) -> dict[str, float]:
    W, change = before.double(), (after.double() - before.double()).norm()
    s = torch.linalg.svdvals(W)
    return {
        "spectral_norm": s[0].item(),
        "frobenius_norm": W.norm().item(),
        "stable_rank": (W.norm() / s[0]).square().item(),
        "update_rms": (change / W.numel() ** 0.5).item(),
        "update_ratio": (change / W.norm()).item(),
    }


def exact_sphere(before: Tensor, M: Tensor, values: dict[str, float]) -> dict[str, float]:
    """What SSO saw, at the lambda that it took."""
    sigma, u, v = oracle.top_triplet(before.double().numpy())
    radius = (before.size(0) / before.size(1)) ** 0.5
    Z = M.double().numpy() / M.double().norm().item() + values.get("lam", 0.0) * np.outer(u, v)
    z = np.linalg.svd(Z, compute_uv=False)
    # The residual is of the Newton-Schulz iteration's msign, which differs from U V^T by up to 1e-2.
    polar = oracle.newton_schulz_factor(Z, polar_coefficients("polar_express", 8))
    return {
        "radius": radius,
        "radius_error": sigma / radius - 1,
        "residual": u @ polar @ v,
        "nuclear_rank": z.sum() ** 2 / (z**2).sum(),
    }


def exact_spike_share(M: Tensor, V: Tensor) -> float:
    """Of the largest singular values as one pass from V finds them."""
    U = np.linalg.qr(M.double().numpy() @ V.double().numpy())[0]
    return (np.linalg.norm(U.T @ M.double().numpy()) / M.double().norm().item()) ** 2


def trained(megatron: Megatron, optimizer: str, *flags: object) -> Run:
    """Two measured iterations that go on from a checkpoint of a run of twenty."""
    length = ["--train-iters", 22, "--lr-decay-iters", 30, *FAMILY.get(optimizer, []), *flags]
    saving = ["--save", "ckpt", "--save-interval", 20, "--exit-interval", 20]
    first = megatron.run(tiny(*length, *saving, optimizer=optimizer))
    going_on = tiny(*length, "--load", first.folder / "ckpt", *EVERY, optimizer=optimizer)
    return megatron.train(going_on, calls=("probes.metrics:capture_steps",))


KINDS: list[tuple[str, list[object]]] = [
    ("sso", []),
    ("sso", ["--sso-weight-decay", 10, "--sso-retract-mode", "dynamic"]),
    ("sso", ["--sso-solver", "bisection"]),
    ("muon_sphere", []),
    *((name, []) for name in FAMILY),
]


@pytest.mark.parametrize(("optimizer", "flags"), KINDS)
def test_exact_values_on_a_trained_checkpoint(
    megatron: Megatron, optimizer: str, flags: list[object]
) -> None:
    run = trained(megatron, optimizer, *flags)
    (steps,) = run.saved("steps")
    tables = measured(run)
    assert list(tables) == [21, 22]
    worst: dict[str, float] = {}
    for iteration, step in zip(tables, steps, strict=True):
        found = tables[iteration]["matrices"]
        assert found.keys() == step.keys()
        for name, (before, after, N, V) in step.items():
            wanted = exact(before, after)
            if optimizer in ("sso", "muon_sphere"):
                wanted |= exact_sphere(before, N, found[name])
            if V is not None:
                wanted["spike_share"] = exact_spike_share(N, V)
            if optimizer.startswith("spectra_clip"):
                s = torch.linalg.svdvals(N.double()).square()
                wanted["clipped_share"] = 1 - ((s / (1 + s / 100)).sum() / s.sum()).item()
            for column, value in wanted.items():
                if column == "nuclear_rank" and "bisection" in flags:
                    assert column not in found[name]
                    continue
                # What may be near zero: norms by the radius, inner products of unit matrices, shares.
                scale = 1.0 if column in ("radius_error", "residual", "clipped_share") else abs(value)
                error = abs(found[name][column] - value) / scale
                worst[column] = max(worst.get(column, 0.0), error)
    print({column: f"{error:.1e}" for column, error in worst.items()})
    assert all(error <= 1e-3 for error in worst.values()), worst


def test_exact_activations(megatron: Megatron) -> None:
    """Tokens, layers, logits behind a causal mask, and tokens of experts, of both microbatches."""
    run = megatron.train(tiny(*MOE, *EVERY), calls=("probes.metrics:capture_activations",))
    (seen,) = run.saved("activations")
    for iteration, captured in enumerate(seen, 1):
        tables = measured(run)[iteration]
        assert list(tables["layers"]) == ["decoder.layers.0", "decoder.layers.1"]
        for layer, found in tables["layers"].items():
            places = {"residual": layer, "attention": f"{layer}.self_attention", "mlp": f"{layer}.mlp"}
            for kind, module in places.items():
                x = torch.cat([part.double().flatten() for part in captured[module]])
                assert found[f"{kind}_rms"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
                assert found[f"{kind}_max"] == pytest.approx(x.abs().max().item(), rel=1e-5)
            core = f"{layer}.self_attention.core_attention"
            pairs = zip(captured[f"{core} 0"], captured[f"{core} 1"], strict=True)
            assert found["logit_max"] == pytest.approx(max(largest_logit(q, k) for q, k in pairs), rel=1e-5)
        (row,) = tables["experts"].values()
        tokens = np.zeros(4)
        for expert in range(4):
            name = f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc1 0"
            tokens[expert] = sum(part.size(0) for part in captured[name])
        assert row["load"] == pytest.approx(list(tokens / tokens.mean()), rel=1e-5)
        assert row["max_vio"] == pytest.approx(tokens.max() / tokens.mean() - 1, rel=1e-5)


def largest_logit(query: Tensor, key: Tensor) -> float:
    """Of ``(tokens, batch, heads, 16)`` queries and half as many heads of keys that are not later."""
    key = key.repeat_interleave(query.size(2) // key.size(2), dim=2)
    scores = torch.einsum("sbhd,tbhd->bhst", query.double(), key.double()) / 16**0.5
    is_later = torch.ones(scores.shape[-2:]).triu(1).bool()
    return scores.masked_fill(is_later, -torch.inf).max().item()


# ---------------------------------------------------------------- the same in every layout


DENSE = ["--num-layers", 4, "--spectral-mup-init", *EVERY]
# Others are measured by test_every_layout.py.
LAYOUTS = {
    "virtual": (4, 1, [*PP2, *VPP2, DIST, "--overlap-grad-reduce", "--micro-batch-size", 1]),
    "tp2-duplicated-dp2": (4, 2, ["--spectral-tp-mode", "duplicated"]),
    # The third pipeline stage has no parameter.
    "empty-stage": (
        4,
        1,
        ["--pipeline-model-parallel-size", 4, "--pipeline-model-parallel-layout", "Et|tt||tL"],
    ),
}


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Run:
    return megatron.train(tiny(*DENSE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(megatron: Megatron, dense: Run, layout: str) -> None:
    ranks, tp, flags = LAYOUTS[layout]
    assert_same_measures(megatron.train(tiny(*DENSE, *flags, tp=tp), ranks), dense)


def test_recomputed_activations(megatron: Megatron, dense: Run) -> None:
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
    recompute += ["--recompute-num-layers", "1"]
    assert_same_measures(megatron.train(tiny(*DENSE, *recompute)), dense)


def test_parts_that_a_layer_does_not_have(megatron: Megatron) -> None:
    """A hybrid model's layers are attention, MLP or experts; a predictor of further tokens has all."""
    argv = tiny(*MOE, *EVERY, "--hybrid-layer-pattern", "*-*E", "--train-iters", 2, "--lr-warmup-iters", 1)
    where = argv.index("--moe-layer-freq")
    del argv[where : where + 2]
    tables = measured(megatron.train(argv))[2]
    has = [
        (row["attention_rms"] is not None, row["mlp_rms"] is not None) for row in tables["layers"].values()
    ]
    assert has == [(True, False), (False, True), (True, False), (False, True)]
    assert list(tables["experts"]) == ["decoder.layers.3"]
    tables = measured(megatron.train(tiny(*MOE, *EVERY, "--mtp-num-layers", 1)))[4]
    assert None not in tables["layers"]["mtp.layers.0"].values()
    assert list(tables["experts"]) == ["decoder.layers.1", "mtp.layers.0"]


def test_other_optimizers_have_health_alone(megatron: Megatron) -> None:
    run = megatron.train(tiny(*EVERY, optimizer="adam"))
    tables = measured(run)[4]
    assert tables["matrices"] == {} and len(tables["layers"]) == 2
    assert records(run)[-1]["headlines"]["update_ratio"] is None


# ---------------------------------------------------------------- the price


@pytest.mark.parametrize("flags", [[], ["--bf16", DIST, *EP2, *MOE]], ids=["dense", "bf16-moe-ep2-dist"])
def test_a_run_is_the_same_with_and_without(megatron: Megatron, flags: list[object]) -> None:
    runs = [megatron.train(tiny(*flags, *more, "--train-iters", 6), 2) for more in ([], EVERY)]
    assert runs[0].losses == runs[1].losses
    assert not (runs[0].folder / "measures.jsonl").exists()
    assert all("headlines" not in record for record in records(runs[0]))


@pytest.mark.parametrize("optimizer", ["sso", "spectra"])
def test_one_collective_at_the_interval(megatron: Megatron, optimizer: str) -> None:
    """Over whole iterations; Spectra, which does not know its norms, sums Gram matrices beside."""
    flags = [*MOE, *EP2, SP, "--expert-tensor-parallel-size", 1, "--log-interval", 100]
    argv = tiny(*flags, "--log-spectral-metrics", 3, "--train-iters", 8, tp=2, optimizer=optimizer)
    run = megatron.train(argv, 2, calls=("probes.metrics:count_iterations",))
    for counted in run.saved("collectives"):
        plain, measured = (Counter(kind for kind, _ in counted[i - 1]) for i in (5, 6))
        more = measured - plain
        assert not plain - measured
        assert more.pop("all_gather_into_tensor") == 1
        assert (more == {}) if optimizer == "sso" else (set(more) == {"all_reduce"})
    assert [record["iteration"] for record in records(run)] == list(range(1, 9))


# ---------------------------------------------------------------- where it goes


def test_tensorboard_and_wandb(megatron: Megatron) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = tiny(*MOE, "--log-spectral-metrics", 2, "--tensorboard-dir", "tb")
    argv += ["--wandb-project", "tiny", "--wandb-exp-name", "run", "--wandb-save-dir", "wandb"]
    run = megatron.run([*argv, "--spectral-run-dir", "."], calls=("probes.metrics:use_wandb_offline",))
    events = EventAccumulator(str(run.folder / "tb"))
    events.Reload()
    rows = measured(run)
    for tag, table, row, column in (
        ("health/max_vio/decoder.layers.1", "experts", "decoder.layers.1", "max_vio"),
        ("health/residual_rms/decoder.layers.0", "layers", "decoder.layers.0", "residual_rms"),
    ):
        written = {event.step: event.value for event in events.Scalars(tag)}
        assert written == pytest.approx({i: rows[i][table][row][column] for i in (2, 4)}, rel=1e-5)
    heads = [f"decoder.layers.{i}.self_attention.linear_qkv.weight[q{q}]" for i in (0, 1) for q in range(4)]
    lam = [rows[4]["matrices"][head]["lam"] for head in heads]
    (last,) = [e.value for e in events.Scalars("spectral/lam/self_attention.linear_qkv.q") if e.step == 4]
    assert last == pytest.approx(np.median(lam), rel=1e-5, abs=1e-9)
    (last,) = [
        e.value for e in events.Scalars("spectral-largest/lam/self_attention.linear_qkv.q") if e.step == 4
    ]
    assert last == pytest.approx(np.abs(lam).max(), rel=1e-5)
    (offline,) = run.folder.rglob("run-*.wandb")
    assert b"spectral/lam/self_attention.linear_qkv.q" in offline.read_bytes()


def test_what_the_run_says_of_itself(megatron: Megatron) -> None:
    run = megatron.train(
        tiny(*EVERY, "--sso-momentum", 0.8, "--save", "ckpt", "--save-interval", 4, tp=2), 2
    )
    said = json.loads((run.folder / "run.json").read_text())
    assert (said["optimizer"], said["train_iters"], said["metrics_interval"]) == ("sso", 4, 1)
    assert said["parallel"] | {"tensor": 2} == said["parallel"] and said["world_size"] == 2
    assert said["settings"]["momentum"] == 0.8 and said["shared"]["qkv_split"] == "head"
    assert said["tokens_per_iteration"] == 4 * 32 and said["save"].endswith("ckpt")
    last = records(run)[-1]
    assert last["alarms"] == [] and last["headlines"]["not_converged"] == 0


def test_a_resumed_run_adds_to_its_files(megatron: Megatron, tmp_path: Path) -> None:
    length = ["--train-iters", 6, *EVERY, "--save", tmp_path / "ckpt", "--save-interval", 3]
    length += ["--spectral-run-dir", tmp_path]
    first = megatron.run(tiny(*length, "--exit-interval", 3))
    second = megatron.run(tiny(*length, "--load", tmp_path / "ckpt", tp=2), 2)
    assert second.folder != first.folder
    run = Run(tmp_path, [0])
    assert [record["iteration"] for record in records(run)] == list(range(1, 7))
    assert list(measured(run)) == list(range(1, 7))
    assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 2


def test_what_a_killed_run_left_unfinished(tmp_path: Path) -> None:
    """Is taken away; and a header that could not be written comes with the next measurement."""
    files = RunFiles(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iterat')
    files.append_lines([{"iteration": 2, "loss": float("nan"), "largest": [float("-inf")]}])
    text = '{"iteration": 1}\n{"iteration": 2, "loss": null, "largest": [-1e999]}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == text
    (tmp_path / "metrics.jsonl").write_text("x" * 200_000)
    files.append_lines([{"iteration": 3}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 3}\n'
    tables = {"layers": Table(("a",), {"x": np.array([np.nan]), "y": np.array([-np.inf])})}
    (tmp_path / "measures.jsonl").mkdir()
    files.append_measures(1, 0.0, None, tables)
    (tmp_path / "measures.jsonl").rmdir()
    files.append_measures(2, 0.0, 0.1, tables)
    head, line = map(json.loads, (tmp_path / "measures.jsonl").read_text().splitlines())
    assert head == {"tables": {"layers": ["a"]}}
    assert line["layers"] == {"x": [None], "y": [-np.inf]} and line["lr"] == 0.1


def test_a_loss_function_that_reports_nothing(megatron: Megatron) -> None:
    """Other records are kept, the criterion's too."""
    argv = tiny(*EVERY, "--log-spectral-criterion", 2)
    run = megatron.train(argv, calls=("probes.metrics:report_nothing",))
    found = records(run)
    assert [record["iteration"] for record in found] == [1, 2, 3, 4]
    assert not any("loss" in record for record in found)
    assert [bool(record.get("criterion")) for record in found] == [False, True, False, True]
    assert list(measured(run)) == [1, 2, 3, 4]
    assert run.summary["first_loss"] is None


# ---------------------------------------------------------------- health


def test_a_step_that_is_skipped_measures_no_weights(megatron: Megatron) -> None:
    argv = tiny(*EVERY, "--no-check-for-nan-in-loss-and-grad")
    run = megatron.train(argv, calls=("probes.criterion:spoil",))
    assert run.log.count("this step is skipped") == 1
    spoilt, sound = measured(run)[2], measured(run)[3]
    for row in spoilt["matrices"].values():
        assert set(row.values()) == {None}
    assert spoilt["layers"]["decoder.layers.0"]["mlp_rms"] == np.inf
    assert None not in sound["matrices"]["decoder.layers.0.mlp.linear_fc2.weight"].values()
    assert all(record["alarms"] == [] for record in records(run)), "one that is over is no alarm"
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()
    assert records(run)[1]["headlines"]["activation_rms"] == np.inf and records(run)[1]["grad_norm"] is None


def test_steps_that_are_skipped_again_and_again_are_an_alarm(megatron: Megatron) -> None:
    argv = tiny(*EVERY, "--no-check-for-nan-in-loss-and-grad", "--spectral-health", "stop")
    run = megatron.run([*argv, "--spectral-run-dir", "."], calls=("probes.metrics:spoil_all",), fails=True)
    assert run.codes == [3]
    alarms = [record["alarms"] for record in records(run)]
    assert alarms[:2] == [[], []] and "decoder.layers.0: " in alarms[2][0] and len(alarms) == 3


@pytest.mark.parametrize("health", ["off", "warn", "stop"])
def test_exploding_activations(megatron: Megatron, health: str) -> None:
    argv = tiny(*EVERY, "--spectral-health", health, "--train-iters", 8, "--spectral-run-dir", ".", tp=2)
    probe = ("probes.metrics:grow_activations",)
    run = megatron.run(argv, 2, calls=probe, fails=health == "stop")
    found = records(run)
    alarms = [text for record in found for text in record["alarms"]]
    if health == "off":
        assert alarms == [] and "health" not in run.log.replace("spectral_health", "")
        return
    assert all("decoder.layers.1: " in text for text in alarms) and alarms
    assert next(record["iteration"] for record in found if record["alarms"]) == 7
    (said,) = [line for line in run.log.splitlines() if "iteration 7: health: " in line]
    assert "decoder.layers.1: mlp: RMS" in said
    if health == "warn":
        assert run.codes == [0, 0] and "iteration 8: health" not in run.log, "told once"
        assert "stopped" not in run.summary
        return
    assert run.codes == [3, 3]
    assert "decoder.layers.1" in str(run.summary["stopped"])
    assert "iteration        7/       8" in run.log, "Megatron has told of the iteration, too"
    assert found[-1]["iteration"] == run.summary["iterations"] == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log-spectral-metrics", 0], "--log-spectral-metrics 0 must be at least 1"),
        (["--log-spectral-metrics", 5], "nowhere to write; name --spectral-run-dir, --tensorboard-dir or"),
        (["--spectral-health", "loud"], "--spectral-health loud must be one of off, warn, stop"),
        (["--spectral-health", "stop"], "goes by what is measured; give --log-spectral-metrics N"),
        ([*EVERY, "--spectral-run-dir", ".", "--use-torch-fsdp2"], "is not known to work; leave one out"),
    ],
)
def test_bad_flags(megatron: Megatron, flags: list[object], message: str) -> None:
    optimizer = "adam" if "--use-torch-fsdp2" in flags else "sso"
    run = megatron.run(tiny(*flags, optimizer=optimizer), calls=("probes:no_process_group",), fails=True)
    assert run.codes == [2]
    assert message in run.log
    assert not (run.folder / "process_group_was_made").exists()
