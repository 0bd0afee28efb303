"""``sso-megatron bench`` measures what an optimizer step costs, beside AdamW and Megatron's Muon."""

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException

from sso_megatron.cli.bench import report as bench_report
from sso_megatron.cli.bench.measure import Settings, bytes_needed, measure
from sso_megatron.cli.bench.models import MODELS
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig
from sso_megatron.optimizers.settings import choices_of, default_of

OPTIMIZERS = (
    *("adamw", "muon", "muon_sphere", "sso_tracking", "sso_bisection"),
    *("spectra", "spectra_clip_adamw"),
)
LAYOUTS = ("fused", "split")
# Some five minutes on two CPU cores; bisection takes most of them.
_HIDDEN, _LAYERS, _ROUNDS, _WARMUP = 512, 4, 5, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sso-megatron bench``."""
    parser.description = (
        "Measure the step of every optimizer in turn, on equal weights and gradients, on the matrix "
        "shapes of the paper's models: on the GPU if there is one, with CUDA_VISIBLE_DEVICES= (empty) on "
        "the CPU."
    )
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="dense-1.7b", help="shapes (default: %(default)s)")
    add("--hidden", type=int, metavar="N", help=f"hidden size; heads and FFN scale (default: {_HIDDEN})")
    add("--layers", type=int, metavar="N", help=f"number of layers (default: {_LAYERS})")
    add("--full-size", action="store_true", help="the model's own hidden size and layers, unless given")
    add("--layout", choices=(*LAYOUTS, "both"), default="both", help="stored parameters as one matrix "
        "each, or heads and gate and up by themselves (default: %(default)s)")  # fmt: skip
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, metavar="NAME",
        help=f"any of {', '.join(OPTIMIZERS)} (default: all)")  # fmt: skip
    add("--repeats", type=int, default=_ROUNDS, metavar="N", help="timed rounds (default: %(default)s)")
    add("--warmup", type=int, default=_WARMUP, metavar="N", help="rounds before (default: %(default)s)")
    add("--tp", type=int, default=1, metavar="N", help="tensor parallelism over N ranks, which are started")
    add("--tp-mode", choices=choices_of(SpectralConfig, "tp_mode"),
        default=default_of(SpectralConfig, "tp_mode"), help="--spectral-tp-mode of ours (default: "
        "%(default)s); Muon runs as duplicated and as distributed")  # fmt: skip
    add("--msign-steps", type=int, default=default_of(SSOConfig, "msign_steps"), metavar="N",
        help="Newton-Schulz steps, of Muon too (default: %(default)s)")  # fmt: skip
    add("--msign-precision", choices=choices_of(SSOConfig, "msign_precision"),
        default=default_of(SSOConfig, "msign_precision"),
        help="of Newton-Schulz products, Muon's too (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write everything to FILE")
    add("--picture", type=Path, metavar="FILE.png", help="draw (default: beside --json)")


def run(options: argparse.Namespace) -> int:
    """Run the ``bench`` command; return 1 when a rank failed."""
    settings = _settings(options)
    _check_memory(settings)
    picture = _output_files(options)
    with tempfile.TemporaryDirectory(prefix="sso-megatron-bench-") as folder:
        try:
            results = measure(settings, Path(folder))
        except (ProcessException, ValueError, OSError) as error:
            # Alone, a rank is this process, and its error is no matter of the command line.
            is_alone = not isinstance(error, ProcessException)
            details = traceback.format_exc() if is_alone else f"{error}\n"
            print(f"{details}sso-megatron bench: error: a rank failed; see above", file=sys.stderr)
            return 1
    bench_report.add_statistics(results)
    bench_report.print_table(settings, results)
    if options.json:
        arguments = {name: value for name, value in vars(options).items() if name != "run"}
        arguments |= {name: str(value) for name, value in arguments.items() if isinstance(value, Path)}
        bench_report.write_json(options.json, settings, arguments, results)
        print(f"figures: {options.json}")
    if picture:
        bench_report.draw(picture, settings, results)
        print(f"picture: {picture}")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    model = MODELS[options.model]
    hidden, layers = (model.hidden, model.layers) if options.full_size else (_HIDDEN, _LAYERS)
    model = model.scaled(
        hidden if options.hidden is None else options.hidden,
        layers if options.layers is None else options.layers,
    )
    model.check_tp(options.tp)
    if options.repeats < 2:
        raise ValueError(f"--repeats {options.repeats} must be at least 2: a spread needs two")
    if options.warmup < 1:
        raise ValueError(f"--warmup {options.warmup} must be at least 1: a first step makes state")
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and options.tp > torch.cuda.device_count():
        raise ValueError(
            f"--tp {options.tp} needs as many GPUs, and there are {torch.cuda.device_count()}; "
            "CUDA_VISIBLE_DEVICES= (empty) measures on the CPU"
        )
    names = [name for name in OPTIMIZERS if name in options.optimizers]
    if options.tp > 1 and "muon" in names:
        names.insert(names.index("muon") + 1, "muon_distributed")
    return Settings(
        model=model,
        optimizers=tuple(names),
        layouts=LAYOUTS if options.layout == "both" else (options.layout,),
        num_rounds=options.repeats,
        num_warmup=options.warmup,
        tp_size=options.tp,
        sso=SSOConfig(msign_steps=options.msign_steps, msign_precision=options.msign_precision),
        shared=SpectralConfig(tp_mode=options.tp_mode),
        device_type=device_type,
    )


def _output_files(options: argparse.Namespace) -> Path | None:
    """Check the files to write, make their folders, and return the file of the picture, if any."""
    files = [path for path in (options.json, options.picture) if path]
    for path in files:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file to write")
    picture: Path | None = options.picture or (options.json and options.json.with_suffix(".png"))
    if picture and (picture.suffix != ".png" or picture == options.json):
        raise ValueError(f"--picture {picture} must end in .png and be another file than --json")
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()  # an error now, not after the measurement
        if is_new:
            path.unlink()
    return picture


def _check_memory(settings: Settings) -> None:
    """Raise ValueError unless there is memory for all optimizers at once."""
    needed = bytes_needed(settings)
    if settings.device_type == "cuda":
        free = min(torch.cuda.mem_get_info(device)[0] for device in range(settings.tp_size))
        where = "on the GPU"
    else:
        needed *= settings.tp_size
        free, where = _available_bytes(), "in the host's memory"
    if needed > free:
        raise ValueError(
            f"all optimizers together need about {needed / 1e9:.1f} GB {where}, and {free / 1e9:.1f} GB "
            "are free; give fewer --layers, a smaller --hidden or fewer --optimizers"
        )


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024
