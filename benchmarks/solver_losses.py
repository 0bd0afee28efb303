"""Validation losses of whole training runs with the tracking solver and with bisection, seed by seed.

The first run's model, longer evaluated: one run after the other on one rank. Prints a table, and the
spread over the seeds beside the difference between the solvers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sso_megatron.cli.data import command as data
from sso_megatron.cli.train import first_run

SOLVERS = ("tracking", "bisection")


def main() -> None:
    """Train, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235, 1236])
    options = parser.parse_args()
    losses: dict[str, list[float]] = {solver: [] for solver in SOLVERS}
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.prepare(Path(folder) / "stdlib", quiet=True)
        print("seed  " + "".join(f"{solver:>12}" for solver in SOLVERS) + "   largest radius error")
        for seed in options.seeds:
            runs = [train(options.iterations, seed, solver, dataset, Path(folder)) for solver in SOLVERS]
            for solver, run in zip(SOLVERS, runs, strict=True):
                losses[solver].append(run["val_loss"])
            errors = max(run["max_radius_error"] for run in runs)
            print(
                f"{seed:<6}" + "".join(f"{run['val_loss']:12.5f}" for run in runs) + f"{errors:23.1e}",
                flush=True,
            )
    means = {solver: statistics.mean(found) for solver, found in losses.items()}
    print("mean  " + "".join(f"{means[solver]:12.5f}" for solver in SOLVERS))
    if len(options.seeds) > 1:
        spreads = [statistics.stdev(found) for found in losses.values()]
        print("spread" + "".join(f"{spread:12.5f}" for spread in spreads))


def train(
    iterations: int, seed: int, solver: str, dataset: data.DatasetInfo, folder: Path
) -> dict[str, float]:
    """``summary.json`` of one run."""
    run = folder / f"{solver}-{seed}"
    run.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "sso_megatron.pretrain_gpt", *first_run._flags("sso", iterations, run, ranks=1)]
    command += [*dataset.megatron_arguments(), "--seed", str(seed), "--sso-solver", solver]
    command += ["--eval-iters", "32"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stderr[-4000:]}")
    summary: dict[str, float] = json.loads((run / "summary.json").read_text())
    return summary


if __name__ == "__main__":
    main()
