"""What ``--log-spectral-metrics 10`` adds to ten iterations, in one run: the first run's model on one rank.

Each measured iteration and the next, in which its numbers are written, are compared with the two before and
the two after: a machine that becomes slower or faster meets all of them.
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


def main() -> None:
    """Train, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=305)
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
        command += ["--log-spectral-metrics", "10", "--eval-iters", "0"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"{' '.join(command)}\n{ended.stderr[-4000:]}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(report({record["iteration"]: record["time"] for record in records}))


def report(times: dict[int, float]) -> str:
    """What a measured iteration takes longer than its neighbours, by ten iterations.

    Args:
        times: when each iteration ended, in seconds, by number.
    """
    last = max(times)
    seconds = statistics.median(times[i] - times[i - 1] for i in range(20, last))
    shares = []
    for measured in range(20, last - 2, 10):
        with_it = times[measured + 1] - times[measured - 1]
        before, after = times[measured - 1] - times[measured - 3], times[measured + 3] - times[measured + 1]
        shares.append((with_it - (before + after) / 2) / (10 * seconds))
    first, median, third = statistics.quantiles(shares, n=4)
    return (
        f"{len(shares)} measured iterations of {seconds:.3f} s: each adds {median:+.2%} to ten iterations "
        f"(quartiles {first:+.2%} to {third:+.2%})"
    )


if __name__ == "__main__":
    main()
