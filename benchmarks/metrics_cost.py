"""What ``--log-spectral-metrics 10`` adds to an iteration, in one run: the first run's model on one rank.

Every twentieth iteration is measured. Ten iterations around a measured one are compared with the ten that
follow, which have none: by turns, so that a machine that becomes slower meets both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sso_megatron.cli import data, first_run


def main() -> None:
    """Train, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=405)
    parser.add_argument("--optimizer", default="sso")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.prepare(Path(folder) / "stdlib", quiet=True)
        run = Path(folder) / "run"
        run.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command += ["-m", "sso_megatron.pretrain_gpt"]
        command += first_run._flags(options.optimizer, options.iterations, run, ranks=1)
        command += [*dataset.megatron_arguments(), "--log-interval", "1000000"]
        command += ["--log-spectral-metrics", "20", "--eval-iters", "0"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"{' '.join(command)}\n{ended.stderr[-4000:]}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(report({record["iteration"]: record["time"] for record in records}))


def report(times: dict[int, float]) -> str:
    """Times of ten iterations with and without a measured one, and the median of their ratios.

    Args:
        times: when each iteration ended, in seconds, by number.
    """
    pairs = [
        (times[middle + 5] - times[middle - 5], times[middle + 15] - times[middle + 5])
        for middle in range(40, max(times) - 14, 20)
    ]
    ratios = sorted(with_it / without - 1 for with_it, without in pairs)
    first, median, third = statistics.quantiles(ratios, n=4)
    seconds = statistics.median(without for _, without in pairs) / 10
    return (
        f"{len(pairs)} pairs of ten iterations of {seconds:.3f} s: a measured one adds {median:+.2%} "
        f"(quartiles {first:+.2%} to {third:+.2%})"
    )


if __name__ == "__main__":
    main()
