"""``sso-megatron first-run`` trains a small Megatron GPT on text that every machine has.

The model has the paper's architecture in small (GQA, SwiGLU, RMSNorm, RoPE, QK-norm, untied embeddings; 2.5
million parameters). It is byte-level and trains on the Python standard library's source files, over two
tensor-parallel ranks, with spectral muP initialisation and a cosine schedule.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from sso_megatron.cli.data import command as data
from sso_megatron.cli.plot import training as plot_training
from sso_megatron.cli.shared.errors import discard_output
from sso_megatron.cli.watch import command as watch
from sso_megatron.runs.file_format import CHECKPOINT, LOG, SUMMARY
from sso_megatron.runs.live_state import RunState

# Numbers that fit two CPU cores: about a second an iteration, a good deal below the loss asked for.
_MODEL = {
    "--num-layers": 6,
    "--hidden-size": 192,
    "--ffn-hidden-size": 512,
    "--num-attention-heads": 6,
    "--num-query-groups": 2,
    "--kv-channels": 32,
    "--seq-length": 256,
    "--max-position-embeddings": 256,
    "--normalization": "RMSNorm",
    "--norm-epsilon": 1e-6,
    "--position-embedding-type": "rope",
    "--rotary-base": 10000,
    "--attention-dropout": 0,
    "--hidden-dropout": 0,
    "--init-method-std": 0.02,
    "--make-vocab-size-divisible-by": 8,
}
_SWITCHES = [
    "--group-query-attention",
    "--swiglu",
    "--qk-layernorm",
    "--untie-embeddings-and-output-weights",
    "--disable-bias-linear",
    # Kernels of TransformerEngine and apex, which a first run must not need.
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
]
_TRAINING = {
    "--transformer-impl": "local",
    "--attention-backend": "unfused",
    "--micro-batch-size": 8,
    "--global-batch-size": 8,
    "--lr-decay-style": "cosine",
    "--weight-decay": 0.1,
    "--adam-beta2": 0.95,
    "--clip-grad": 1.0,
    "--eval-iters": 4,
    "--log-interval": 5,
    "--log-spectral-metrics": 5,
    "--seed": 1234,
}
# Peak learning rates; the paper's 5e-3 belongs to 100 000 million tokens, these runs see 0.3 million.
_LEARNING_RATES = {"sso": 2e-2, "muon_sphere": 2e-2, "spectra_clip_signum": 1e-3}
_OTHER_LEARNING_RATE = 3e-3
_ON_SPHERES = ("sso", "muon_sphere")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron first-run``."""
    parser.add_argument("--optimizer", default="sso", help="any --optimizer of Megatron's or ours")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for runs and data")
    parser.add_argument("extra", nargs="*", help="after --: further Megatron flags, which win")


def run(options: argparse.Namespace) -> int:
    """Prepare data, train, draw, and print one JSON object as the last line of standard output."""
    if options.iterations < 10:
        raise ValueError(f"--iterations {options.iterations} must be at least 10")
    output = options.output.resolve()
    # Every Python version has its own standard library.
    name = f"stdlib-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    dataset = data.prepare(output=output / "data" / name)
    folder = output / f"{options.optimizer}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir()
    ranks = _num_ranks()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "sso_megatron.pretrain_gpt"),
        *_flags(options.optimizer, options.iterations, folder, ranks),
        *dataset.megatron_arguments(),
        *options.extra,
    ]
    watch.exit_on_signals()  # a closed terminal or a time limit must stop the ranks as Ctrl-C does
    status = _train(command, folder, options.iterations)
    if status:
        return status
    print(f"picture: {plot_training.draw_run(folder)}\ncheckpoint: {folder / CHECKPOINT}")
    print((folder / SUMMARY).read_text().strip())
    return 0


def _num_ranks() -> int:
    """Return how many ranks train: two, or one on a single GPU, because NCCL takes one rank a device."""
    import torch

    return 1 if torch.cuda.is_available() and torch.cuda.device_count() == 1 else 2


def _flags(optimizer: str, iterations: int, folder: Path, ranks: int) -> list[str]:
    lr = _LEARNING_RATES.get(optimizer, _OTHER_LEARNING_RATE)
    valued = _MODEL | _TRAINING
    valued |= {
        "--tensor-model-parallel-size": ranks,
        "--train-iters": iterations,
        "--lr-warmup-iters": iterations // 10,
        "--lr": lr,
        "--min-lr": lr / 10,
        "--eval-interval": iterations,
        "--optimizer": optimizer,
        "--save": folder / CHECKPOINT,
        "--save-interval": iterations,
        "--ckpt-format": "torch_dist",
        "--spectral-run-dir": folder,
    }
    switches = _SWITCHES + (["--spectral-mup-init"] if optimizer in _ON_SPHERES else [])
    return [*switches, *(str(part) for pair in valued.items() for part in pair)]


def _train(command: list[str], folder: Path, iterations: int) -> int:
    """Run the training processes, showing progress; return their exit code."""
    log_path = folder / LOG
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    # Megatron insists on the second under tensor parallelism on GPUs before Blackwell.
    env = {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ}
    print(f"training; Megatron's own output is in {log_path}", flush=True)
    with log_path.open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            try:
                watch.follow(RunState(folder, total=iterations), lambda: process.poll() is not None)
            except OSError as error:  # the training does not need its view
                if isinstance(error, BrokenPipeError):
                    discard_output()
                with contextlib.suppress(OSError):
                    print(
                        f"sso-megatron first-run: progress is not shown any more: {error}", file=sys.stderr
                    )
            process.wait()
        except BaseException:
            # torchrun passes the signal on to its ranks and ends when they have.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            raise
    status = process.wait()
    if status:
        tail = "\n".join(_own_lines(log_path) or log_path.read_text().splitlines()[-30:])
        print(f"{tail}\nsso-megatron first-run: error: training ended with exit code {status}; "
              f"all of its output is in {log_path}", file=sys.stderr)  # fmt: skip
    return status


def _own_lines(log_path: Path) -> list[str]:
    lines = log_path.read_text().splitlines()
    return [line for line in lines if line.startswith("sso_megatron: error:")]
