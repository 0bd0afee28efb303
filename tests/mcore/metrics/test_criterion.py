"""The criterion that a run records, against exact singular values, and the same in every layout."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.megatron_runs import MOE, Megatron, Run, expert_by_itself, tiny
from helpers.runs.layouts import DENSE_LAYOUTS, DIST, MOE_LAYOUTS, PP2, VPP2
from sso_megatron.cli.main import main
from sso_megatron.runs import criterion_table

EVERY = ["--log-spectral-criterion", 2]
DIST_OVERLAP = [DIST, "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {"virtual": (4, 1, [*PP2, *VPP2, *DIST_OVERLAP, "--micro-batch-size", 1])}
# Heads of the tiny model: two query groups of two queries, a key and a value, 16 rows each.
KINDS = {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}


def recorded(run: Run) -> dict[int, dict[str, dict[str, float]]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        line["iteration"]: {expert_by_itself(name): row for name, row in line["criterion"].items()}
        for line in lines
        if "criterion" in line
    }


def nuclear_rank(blocks: list[Tensor]) -> float:
    values = [torch.linalg.svdvals(block.double()) for block in blocks]
    return (sum(s.sum() ** 2 for s in values) / sum(s.square().sum() for s in values)).item()


def stable_rank(A: Tensor) -> float:
    if not A.is_floating_point():
        return A.numel() / A.flatten().bincount().max().item()
    s = torch.linalg.svdvals(A.double())
    return (s.square().sum() / s[0] ** 2).item()


def blocks_of(name: str, G: Tensor) -> dict[str, list[Tensor]]:
    if name.endswith("linear_qkv"):
        heads = G.split(16)
        return {f".{kind}": [heads[i] for i in places] for kind, places in KINDS.items()}
    if name.endswith("linear_fc1"):
        gate, up = G.chunk(2)
        return {".gate": [gate], ".up": [up]}
    return {"": [G]}


@pytest.mark.parametrize("optimizer", ["sso", "adam"])
def test_exact_values(megatron: Megatron, optimizer: str) -> None:
    run = megatron.train(tiny(*EVERY, optimizer=optimizer), calls=("probes.criterion:capture",))
    found = recorded(run)
    assert list(found) == [2, 4]
    captured = run.saved("captured")[0]
    wanted = {
        f"{name}.weight{kind}": (nuclear_rank(blocks), stable_rank(A))
        for name, (A, G) in captured.items()
        for kind, blocks in blocks_of(name, G).items()
    }
    assert found[2].keys() == wanted.keys()
    for name, (nuclear, stable) in wanted.items():
        values = found[2][name]
        assert values["nuclear_rank"] == pytest.approx(nuclear, rel=2e-3), name
        assert values["stable_rank"] == pytest.approx(stable, rel=1e-2), name
        assert values["gain"] == pytest.approx(nuclear / stable, rel=1.3e-2), "both errors"


def assert_same(run: Run, reference: Run) -> None:
    found, wanted = recorded(run), recorded(reference)
    assert found.keys() == wanted.keys()
    worst = {"nuclear_rank": 0.0, "stable_rank": 0.0}
    for iteration, rows in wanted.items():
        assert found[iteration].keys() == rows.keys()
        for name, values in rows.items():
            for key in worst:
                error = abs(found[iteration][name][key] / values[key] - 1)
                worst[key] = max(worst[key], error)
    print(worst)
    assert worst["nuclear_rank"] <= 1e-3
    assert worst["stable_rank"] <= 2e-2
    assert run.losses == pytest.approx(reference.losses, rel=1e-4)


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Run:
    return megatron.train(tiny("--num-layers", 4, "--spectral-mup-init", *EVERY))


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "cp2", "dp2-dist", "tp2-pp2-dp2-dist", "virtual"])
def test_dense_layouts(megatron: Megatron, dense: Run, layout: str) -> None:
    ranks, tp, flags = (LAYOUTS | DENSE_LAYOUTS)[layout]
    argv = tiny("--num-layers", 4, "--spectral-mup-init", *EVERY, *flags, tp=tp)
    assert_same(megatron.train(argv, ranks), dense)


@pytest.fixture(scope="module")
def moe(megatron: Megatron) -> Run:
    return megatron.train(tiny(*MOE, "--spectral-mup-init", *EVERY))


@pytest.mark.parametrize("layout", ["tp2-ep2-etp1", "tp2-etp2", "ep2-dist", "grouped"])
def test_moe_layouts(megatron: Megatron, moe: Run, layout: str) -> None:
    ranks, tp, flags = MOE_LAYOUTS[layout]
    assert_same(megatron.train(tiny(*MOE, "--spectral-mup-init", *EVERY, *flags, tp=tp), ranks), moe)


@pytest.mark.parametrize("optimizer", ["sso", "adam"])
def test_a_run_is_the_same_with_and_without(megatron: Megatron, optimizer: str) -> None:
    """Sharded gradients too, which the criterion puts together in place."""
    argv = tiny(*DIST_OVERLAP, "--bf16", "--train-iters", 6, optimizer=optimizer)
    plain, measured = (megatron.train([*argv, *map(str, flags)], 2) for flags in ([], EVERY))
    assert plain.losses == measured.losses
    assert recorded(measured) and not recorded(plain)


def test_a_spoilt_step_is_skipped_all_the_same(megatron: Megatron) -> None:
    argv = tiny(*EVERY, "--no-check-for-nan-in-loss-and-grad")
    run = megatron.train(argv, calls=("probes.criterion:spoil",))
    assert run.log.count("this step is skipped") == 1
    spoilt, sound = recorded(run).values()
    after = spoilt["decoder.layers.1.self_attention.linear_qkv.weight.q"]
    assert after == {"nuclear_rank": None, "stable_rank": None, "gain": None}
    assert all(values["gain"] > 0 for values in sound.values())


def test_recomputed_activations_and_tied_embeddings(megatron: Megatron, dense: Run) -> None:
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
    recompute += ["--recompute-num-layers", "1"]
    run = megatron.train(tiny("--num-layers", 4, "--spectral-mup-init", *EVERY, *recompute))
    assert_same(run, dense)
    argv = tiny(*EVERY)
    argv.remove("--untie-embeddings-and-output-weights")
    (rows, _) = recorded(megatron.train(argv)).values()
    (staged, _) = recorded(megatron.train([*argv, *map(str, PP2)], 2)).values()
    assert staged.keys() == rows.keys()
    assert rows["embedding.word_embeddings.weight"]["stable_rank"] is None
    assert rows["embedding.word_embeddings.weight"]["gain"] is None
    assert rows["embedding.word_embeddings.weight"]["nuclear_rank"] > 1


def test_table_and_picture(dense: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (dense.folder / "criterion.png").stat().st_size > 10_000
    assert "spectral criterion, medians of 2 iterations from 2 to 4" in dense.log
    files = ["--json", str(tmp_path / "c.json"), "--picture", str(tmp_path / "c.png")]
    assert main(["criterion", str(dense.folder), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("mlp.linear_fc2 ")]
    cells, _ = criterion_table.read(dense.folder)
    some = [cell for cell in cells if cell.module == "mlp.linear_fc2"]
    assert [cell.layer for cell in some] == [0, 1, 2, 3]
    assert line.split()[1] == "0-3"
    rows = recorded(dense)
    names = [f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(4)]
    gains = [(rows[2][name]["gain"] + rows[4][name]["gain"]) / 2 for name in names]
    assert line.split()[4:7] == [f"{f(gains):.3g}" for f in (statistics.median, min, max)]
    helped = sum(gain >= 1 for gain in gains)
    wanted = {0: "does not help", 4: "helps"}.get(helped, f"helps in {helped} of 4 layers")
    assert re.split(" {2,}", line.strip())[-1] == wanted
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["iterations"] == [2, 4]
    assert len(record["modules"]) == len(cells)
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert main(["criterion", str(dense.folder), "--by-layer", "--since", "4"]) == 0
    assert "iteration 4" in capsys.readouterr().out


def test_a_table_of_a_run_that_was_killed_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that was not finished is named; of an iteration that was done twice the second counts."""

    def line(iteration: int, gain: float) -> str:
        found = {"output_layer.weight": {"nuclear_rank": gain, "stable_rank": 1.0, "gain": gain}}
        return json.dumps({"iteration": iteration, "loss": 1.0, "criterion": found})

    text = [line(2, 1.0), line(4, 9.0), '{"iteration": 5, "lo', line(4, 3.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    (cell,), iterations = criterion_table.read(tmp_path)
    assert iterations == [2, 4] and cell.gain == 2.0
    assert "metrics.jsonl, line 3 is not whole, and is left out" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nothing trained", "no picture"])
def test_a_report_that_fails_does_not_end_the_run(megatron: Megatron, tmp_path: Path, what: str) -> None:
    folder, flags = tmp_path / "run", ["--skip-train"] if what == "nothing trained" else []
    if what == "no picture":
        (folder / "criterion.png").mkdir(parents=True)
    run = megatron.run(tiny(*EVERY, *flags, "--eval-iters", 1, "--spectral-run-dir", folder))
    assert "the criterion is not shown" in run.log
    assert (folder / "summary.json").exists()


def test_rows_follow_the_splits(megatron: Megatron) -> None:
    argv = tiny(*EVERY, "--spectral-qkv-split", "whole", optimizer="adam")
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in recorded(megatron.train(argv))[2]


def test_verdicts() -> None:
    def cells(*gains: float | None) -> list[criterion_table.Cell]:
        return [criterion_table.Cell("m", i, 1.0, 1.0, gain) for i, gain in enumerate(gains)]

    assert criterion_table.verdict(cells(1.5, 2.0)) == "helps"
    assert criterion_table.verdict(cells(0.5, 0.9)) == "does not help"
    assert criterion_table.verdict(cells(0.5, 1.0, 3.0)) == "helps in 2 of 3 layers"
    assert criterion_table.verdict(cells(None)) == "not known"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log-spectral-criterion", 0], "--log-spectral-criterion 0 must be at least 1"),
        (["--log-spectral-criterion", 5], "name one with --spectral-run-dir"),
        (
            [*EVERY, "--spectral-run-dir", ".", "--cuda-graph-impl", "local"],
            "--cuda-graph-impl local: a replayed forward pass cannot be looked at",
        ),
        ([*EVERY, "--spectral-run-dir", ".", "--use-torch-fsdp2"], "gradients are not whole on any rank"),
    ],
)
def test_bad_flags(megatron: Megatron, flags: list[object], message: str) -> None:
    run = megatron.run(tiny(*flags), fails=True)
    assert run.codes == [2]
    assert message in run.log


def test_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["criterion", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    assert main(["criterion", str(tmp_path)]) == 2
    assert "train with --log-spectral-criterion N" in capsys.readouterr().err
