"""How near SSO's updates come to an exact solution by SVD in float64, over a training run on one rank.

Prints quantiles, over all matrices of every 25th step, of the tangent residual, the objective lost, the
update's norm, lambda, h before its removal, and the number of msign evaluations.
"""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.probes.quality import record
from sso_megatron.mcore import entry

WIDER = ["--hidden-size=384", "--ffn-hidden-size=1024", "--num-attention-heads=12", "--num-query-groups=4"]
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)


def main() -> None:
    """Train, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wider", action="store_true", help="hidden size 384 instead of 192")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--every", type=int, default=25, help="steps from one measurement to the next")
    parser.add_argument("extra", nargs="*", help="after --: further flags, as --sso-solver bisection")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = train(options, Path(folder))
    found["lam - best_lam"] = found["lam"] - found["best_lam"]
    print(f"{len(found['step'])} updates\n{'quantile':16}" + "".join(f"{q:>11}" for q in QUANTILES))
    for name, values in found.items():
        row = values.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        print(f"{name:16}" + "".join(f"{value:11.2e}" for value in row))


def train(options: argparse.Namespace, folder: Path) -> dict[str, torch.Tensor]:
    """Figures by name, one entry an update, of a run in this process."""
    entry.enter()  # before anything imports megatron
    from sso_megatron.cli.data import command as data
    from sso_megatron.cli.train import first_run, pretrain_gpt

    dataset = data.prepare(folder / "stdlib", quiet=True)
    flags = first_run._flags("sso", options.iterations, folder, ranks=1)
    flags += [*dataset.megatron_arguments(), *(WIDER if options.wider else []), *options.extra]
    sys.argv = ["update_quality.py", *flags]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["QUALITY_EVERY"] = str(options.every)
    os.chdir(folder)
    record()
    pretrain_gpt.main()
    return torch.load("quality0.pt")


if __name__ == "__main__":
    main()
