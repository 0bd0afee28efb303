"""``sso-megatron bench``: its meters by known values, its figures by hand counts, its errors."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from helpers.processes import HANGS_AFTER
from sso_megatron.cli.bench.meters import Collectives, Flops, HostSyncs, PeakMemory
from sso_megatron.cli.bench.models import MODELS, stored_parameters
from sso_megatron.cli.main import main


def test_flops_of_products() -> None:
    with Flops() as flops:
        torch.randn(3, 5, 7) @ torch.randn(3, 7, 2)
        torch.addmm(torch.ones(4, 6), torch.ones(4, 8), torch.ones(8, 6))
    assert flops.total == 2 * 3 * 5 * 7 * 2 + 2 * 4 * 8 * 6


ONE, X = torch.tensor(1), torch.eye(3)
SYNCS: dict[str, Callable[[], Any]] = {
    "item": lambda: ONE.item(),
    "bool": lambda: bool(ONE > 0),
    "int": lambda: int(ONE),
    "float": lambda: float(ONE),
    "index": lambda: range(3)[ONE],
    "format": lambda: f"{ONE:.1f}",
    "repr": lambda: repr(X),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "array": lambda: X.__array__(),
    "cpu": lambda: X.cpu(),
    "to cpu": lambda: X.to("cpu"),
    "slice": lambda: X[:ONE],
    "mask": lambda: X[X > 0],
    "masked_select": lambda: X.masked_select(X > 0),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "in": lambda: 1.0 in X,
    "scalar argument": lambda: X.add(X, alpha=ONE),
    "repeat_interleave": lambda: X.repeat_interleave(torch.ones(3, dtype=torch.int64), 0),
    "onto the device": lambda: torch.tensor([1.0], device=X.device),
    "eigh": lambda: torch.linalg.eigh(X),
    "svd": lambda: torch.linalg.svd(X),
    "svdvals": lambda: torch.linalg.svdvals(X),
    "spectral norm": lambda: torch.linalg.matrix_norm(X, 2),
    "inv": lambda: torch.linalg.inv(X),
    "solve": lambda: torch.linalg.solve(X, X),
    "cholesky": lambda: torch.linalg.cholesky(X),
}
FREE: dict[str, Callable[[], Any]] = {
    "products": lambda: X @ X + ONE,
    "where": lambda: torch.where(X > 0, X, 0.0),
    "masked_fill": lambda: X.masked_fill(X > 0, 1.0),
    "gather": lambda: X[torch.tensor([0, 2])],
    "cast": lambda: X.to(torch.float64),
    "same device": lambda: X.to(X.device, torch.float64),
    "for the host": lambda: torch.tensor([1.0]),
    "clamp": lambda: X.clamp(min=ONE),
    "qr": lambda: torch.linalg.qr(X),
    "cholesky_ex": lambda: torch.linalg.cholesky_ex(X),
    "inv_ex": lambda: torch.linalg.inv_ex(X),
    "solve_ex": lambda: torch.linalg.solve_ex(X, X),
    "shape": lambda: (len(X), X.shape, X.numel()),
}


@pytest.mark.parametrize("name", SYNCS)
def test_host_synchronisations(name: str) -> None:
    with HostSyncs() as syncs:
        SYNCS[name]()
    assert syncs.count == 1, syncs.sources


@pytest.mark.parametrize("name", FREE)
def test_no_host_synchronisation(name: str) -> None:
    with HostSyncs() as syncs:
        FREE[name]()
    assert syncs.count == 0, syncs.sources


def test_what_is_on_the_host_anyway_is_free() -> None:
    with HostSyncs(on_host=[ONE]) as syncs:
        ONE.item()
        X.sum().item()
    assert syncs.count == 1, syncs.sources


def test_nothing_is_counted_outside() -> None:
    with Flops() as flops, PeakMemory() as memory, HostSyncs() as syncs:
        pass
    (X @ X).sum().item()
    assert (flops.total, memory.peak_bytes, syncs.count) == (0, 0, 0)


@pytest.mark.gpu
def test_host_synchronisations_on_cuda() -> None:
    x = torch.ones(3, device="cuda")
    with HostSyncs("cuda") as syncs:
        x.add(1).sum().item()
        torch.where(x > 0, x, 0.0)
        x.nonzero()
    assert syncs.count == 2, syncs.sources
    assert all("test_bench.py" in source for source in syncs.sources)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_memory(device: str) -> None:
    """Two tensors of a MiB at once at most; views, results in place and what was there are free."""
    before = torch.ones(1 << 18, device=device)
    with PeakMemory(device) as memory:
        first = before + 1
        first.mul_(2).view(2, -1)
        before.neg_()
        second = first + 1
        del first
        third = second * 2
        del second, third
        before.clone()
    assert memory.peak_bytes == 2 << 20


def every_collective(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    x = torch.ones(size * 10)  # 120 bytes, 40 a rank
    expected: dict[str, tuple[int, int]] = {}

    def parts() -> list[Tensor]:
        return [torch.empty(10) for _ in range(size)]

    with Collectives() as meter:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        expected["all_reduce"] = (2, 2 * 160)
        dist.all_gather_into_tensor(torch.empty(30), x[:10])
        dist.all_gather(parts(), x[:10])
        expected["all_gather"] = (2, 2 * 80)
        dist.reduce_scatter_tensor(torch.empty(10), x)
        expected["reduce_scatter"] = (1, 80)
        dist.all_to_all_single(torch.empty(30), x)
        splits = [[1, 2, 3], [2, 4, 6], [3, 6, 9]]  # rows received by rank
        sent = [row[rank] for row in splits]
        received = torch.empty(sum(splits[rank]))
        dist.all_to_all_single(received, x[: sum(sent)].clone(), splits[rank], sent)
        expected["all_to_all"] = (2, 80 + 4 * (sum(splits[rank]) - splits[rank][rank]))
        dist.broadcast(x, 0)
        expected["broadcast"] = (1, 120 if rank else 0)
        dist.reduce(x, 0)
        expected["reduce"] = (1, 0 if rank else 120)
        dist.gather(x[:10], None if rank else parts(), 0)
        expected["gather"] = (1, 0 if rank else 80)
        dist.scatter(x[:10].clone(), None if rank else parts(), 0)
        expected["scatter"] = (1, 40 if rank else 0)
        dist.barrier()
        expected["barrier"] = (1, 0)
        if rank == 0:
            dist.send(x, 1)
            expected["send"] = (1, 0)
        elif rank == 1:
            dist.recv(x, 0)
            expected["recv"] = (1, 120)
    dist.all_reduce(x)
    found = {name: (calls, meter.received[name]) for name, calls in meter.calls.items()}
    assert found == expected
    assert meter.count == sum(calls for calls, _ in expected.values())
    assert meter.received_bytes == sum(received for _, received in expected.values())
    dist.destroy_process_group()


def test_collectives_and_their_bytes(tmp_path: Path) -> None:
    mp.start_processes(every_collective, (3, str(tmp_path)), nprocs=3, start_method="fork")


@pytest.mark.parametrize(
    ("name", "billions"), [("dense-1.7b", 1.409), ("moe-8b-a1b", 8.34), ("deepnet-200", 0.786)]
)
def test_models_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    sizes = [rows * columns for rows, columns in (s.shape for s in stored_parameters(MODELS[name]))]
    assert sum(sizes) / 1e9 == pytest.approx(billions, abs=6e-3 if name.startswith("moe") else 6e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--hidden 192", "--hidden 192 must be 128 or a multiple of 256: Dense 1.7B has a query group of"),
        ("--layers 0", "--layers 0 must be at least 1"),
        ("--model moe-8b-a1b --layers 1", "--layers 1 must be at least 2: the first layer of MoE 8B-A1B"),
        ("--repeats 1", "--repeats 1 must be at least 2"),
        ("--warmup 0", "--warmup 0 must be at least 1"),
        ("--tp 0", "--tp 0 must be at least 1"),
        ("--hidden 512 --tp 4", "--tp 4 must divide the model's 2 query groups"),
        ("--msign-steps 0", "msign_steps=0 must be at least 1"),
        ("--hidden 65536", "GB are free; give fewer --layers"),
        ("--json .", ". is a folder; name a file to write"),
        ("--picture out.pdf", "--picture out.pdf must end in .png"),
    ],
)
def test_one_line_errors_before_anything_starts(
    argv: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argv.split()]) == 2
    assert not any(tmp_path.iterdir())
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("sso-megatron bench: error: ")
    assert message in line


# One process for all runs: importing Megatron takes some ten seconds.
DRIVER = """
import sys
from sso_megatron.cli.bench import measure as bench_measure
from sso_megatron.cli.main import main

def bench(name, argv):
    argv = [*argv.split(), "--warmup", "1", "--repeats", "2", "--msign-steps", "5"]
    code = main(["bench", *argv, "--json", f"{sys.argv[1]}/{name}.json"])
    sys.stdout.flush()
    return code

assert bench("dense-1.7b", "--hidden 128 --layers 1") == 0
few = "--optimizers adamw muon muon_sphere sso_tracking"  # bisection on 130 experts takes a while
assert bench("moe-8b-a1b", f"--model moe-8b-a1b --hidden 128 --layers 2 {few}") == 0
assert bench("deepnet-200", "--model deepnet-200 --hidden 128 --layers 1") == 0
two = "--model deepnet-200 --hidden 256 --layers 1 --tp 2 --optimizers muon muon_sphere sso_tracking"
assert bench("tp2", f"{two} --tp-mode duplicated") == 0

measure_layout = bench_measure._measure_layout

def fail_on_rank_1(layout, settings, rank, device):
    if rank == 1:
        raise RuntimeError("out of coffee")
    return measure_layout(layout, settings, rank, device)

bench_measure._measure_layout = fail_on_rank_1
assert bench("failed", two) == 1
"""


class Ended:
    """What the driver wrote."""

    def __init__(self, folder: Path, output: str, errors: str) -> None:
        self.folder, self.output, self.errors = folder, output, errors

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("bench")
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=HANGS_AFTER,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return Ended(folder, run.stdout, run.stderr)


OURS = {"muon_sphere": 1, "sso_tracking": 2}


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("model", MODELS)
def test_figures_of_one_rank(model: str, layout: str, ended: Ended) -> None:
    found = ended.json(model)
    results = found["results"][layout]
    names = ["adamw", "muon", "power_iteration", "muon_sphere", "sso_tracking", "sso_bisection"]
    names += ["spectra", "spectra_clip_adamw"]
    assert list(results) == (names[:5] if model == "moe-8b-a1b" else names)
    for result in results.values():
        assert len(result["seconds"]) == 2
        assert min(result["seconds"]) > 0
        first, third = result["quartiles_seconds"]
        assert first <= result["median_seconds"] <= third
        muon = results["muon"]["median_seconds"]
        assert result["ratio_of_medians"] == pytest.approx(result["median_seconds"] / muon)
        assert result["collectives"] == {} and result["received_bytes"] == 0
        assert result["peak_bytes"] > 0
    # Muon's flops by hand: a Gram matrix, its square and the product with the matrix, five times.
    shapes = [(sorted(entry["shape"]), entry["count"]) for entry in found["matrices"][layout]]
    by_hand = sum(n * 5 * (4 * long * short**2 + 2 * short**3) for (short, long), n in shapes)
    assert results["muon"]["flops"] == by_hand
    assert results["adamw"]["flops"] == 0
    assert results["power_iteration"]["flops"] < results["muon_sphere"]["flops"]
    for name, trials in OURS.items():
        assert results[name]["trials_per_matrix"] == trials
    numel = sum(long * short * n for (short, long), n in shapes)
    counters = results["adamw"]["state_bytes"] - 2 * 4 * numel
    assert 0 < counters < 100 * sum(n for _, n in shapes)
    assert results["muon"]["state_bytes"] == 4 * numel
    if "spectra" in results:
        assert 0.5 < results["spectra"]["state_bytes"] / results["adamw"]["state_bytes"] <= 0.51
        assert results["spectra"]["flops"] < 0.25 * results["muon"]["flops"]
        assert results["spectra_clip_adamw"]["state_bytes"] == 2 * 4 * numel
    assert results["sso_tracking"]["max_residual"] < 1e-2
    assert results["adamw"]["host_syncs"] == results["muon"]["host_syncs"] == 0
    if "sso_bisection" in results:
        bisection = results["sso_bisection"]
        assert 5 <= bisection["trials_per_matrix"] <= 11, "as is published of training"
        assert bisection["max_residual"] <= 2e-4
        assert bisection["host_syncs"] > results["sso_tracking"]["host_syncs"]


def test_both_layouts_hold_the_same_numbers(ended: Ended) -> None:
    for model in MODELS:
        matrices = ended.json(model)["matrices"]
        numels = {
            layout: sum(entry["count"] * entry["shape"][0] * entry["shape"][1] for entry in entries)
            for layout, entries in matrices.items()
        }
        assert numels["fused"] == numels["split"]
    assert ended.json("dense-1.7b")["matrices"]["split"] == [
        {"shape": [128, 128], "count": 4},  # one head each of Q, K and V, and the projection
        {"shape": [384, 128], "count": 2},
        {"shape": [128, 384], "count": 1},
    ]


def test_json_and_picture(ended: Ended) -> None:
    found = ended.json("dense-1.7b")
    assert set(found["versions"]) == {
        "sso-megatron",
        "python",
        "torch",
        "megatron-core",
        "emerging-optimizers",
    }
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["arguments"]["msign_steps"] == 5
    assert found["machine"]["cpu"] and found["machine"]["threads"] == 1
    assert found["model"]["hidden"] == 128
    assert (ended.folder / "dense-1.7b.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_plain_text_without_a_terminal(ended: Ended) -> None:
    assert "\x1b" not in ended.output
    assert all(character.isascii() for character in ended.output)
    rows = [line.split() for line in ended.output.splitlines() if line.startswith(" SSO, tracking")]
    assert len(rows) == 8, "two layouts of three models, and of tensor parallelism"
    assert all(row[-1].replace(".", "").isdigit() for row in rows), "the last column is there"


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_collectives_of_two_ranks(layout: str, ended: Ended) -> None:
    """Muon gathers every cut momentum; ours every cut weight and momentum; heads lie whole."""
    results = ended.json("tp2")["results"][layout]
    qkv, proj, fc1, fc2 = 1024 * 256, 256 * 512, 2 * 768 * 256, 256 * 768
    cut = [qkv, proj, fc1, fc2] if layout == "fused" else [proj, fc1 // 2, fc1 // 2, fc2]
    received = 4 * sum(cut) // 2
    assert results["muon"]["collectives"] == {"all_gather": 4}
    assert results["muon"]["received_bytes"] == received
    # Eight steps would be eight sums; these are five, and one for the norm.
    assert results["muon_distributed"]["collectives"] == {"all_reduce": 4 * 6}
    sides = [256**2, 256**2, 256**2, 256**2]
    assert results["muon_distributed"]["received_bytes"] == 4 * (5 * sum(sides) * 4 + 4 * 4) // 4
    for name in OURS:
        assert results[name]["received_bytes"] == 2 * received
        assert list(results[name]["collectives"]) == ["all_gather"]
        assert results[name]["collectives"]["all_gather"] <= 4
        assert all("duplicated" in placed for placed in results[name]["placements_by_rank"])


def test_a_failed_rank_ends_the_others(ended: Ended) -> None:
    assert "out of coffee" in ended.errors
    assert ended.errors.splitlines()[-1] == "sso-megatron bench: error: a rank failed; see above"
    assert not (ended.folder / "failed.json").exists()
