"""Reports what ``sso-megatron bench`` found: ratios, table, JSON and picture."""

import datetime
import json
import platform
import statistics
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sso_megatron.cli.bench.measure import Result, Settings
from sso_megatron.cli.bench.models import layout_of, stored_parameters
from sso_megatron.cli.bench.optimizers import TITLES
from sso_megatron.version import __version__

Results = dict[str, dict[str, Result]]
"""Maps a layout to the results of each optimizer."""


def add_statistics(results: Results) -> None:
    """Put medians, quartiles and ratios to Muon beside the measured seconds, in place."""
    for by_name in results.values():
        muon = by_name["muon"]["seconds"] if "muon" in by_name else None
        for result in by_name.values():
            seconds = result["seconds"]
            first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
            result["median_seconds"], result["quartiles_seconds"] = median, [first, third]
            result["ratio_of_medians"] = result["median_of_ratios"] = None
            if muon:
                result["ratio_of_medians"] = median / statistics.median(muon)
                ratios = [own / other for own, other in zip(seconds, muon, strict=True)]
                result["median_of_ratios"] = statistics.median(ratios)


def shapes(settings: Settings, layout: str) -> list[tuple[tuple[int, int], int]]:
    """Return the shapes of the model's matrices and how many there are of each, the most frequent first."""
    found: Counter[tuple[int, int]] = Counter()
    for stored in stored_parameters(settings.model):
        one = layout_of(
            stored, settings.model, is_split=layout == "split", tp_size=1, tp_rank=0, tp_group=None
        )
        found.update(split.shape for split in one.splits)
    return found.most_common()


def write_json(path: Path, settings: Settings, arguments: dict[str, Any], results: Results) -> None:
    """Write settings, machine, matrices, notes and results to a JSON file.

    Args:
        path: the file.
        settings: what was measured.
        arguments: the command line.
        results: with statistics.
    """
    packages = ("torch", "megatron-core", "emerging-optimizers")
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "sso-megatron": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "machine": machine(settings.device_type),
        "arguments": arguments,
        "model": vars(settings.model),
        "matrices": {
            layout: [{"shape": shape, "count": count} for shape, count in shapes(settings, layout)]
            for layout in results
        },
        "notes": notes(settings),
        "results": {
            layout: {name: {"title": TITLES[name], **result} for name, result in by_name.items()}
            for layout, by_name in results.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def machine(device_type: str) -> dict[str, Any]:
    """Return the processor that was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {"cpu": names[0] if names else platform.machine(), "threads": torch.get_num_threads()}
    if device_type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def notes(settings: Settings) -> list[str]:
    """Return what a reader must know to read the figures."""
    sso = settings.sso
    wait = "torch.cuda's own count" if settings.device_type == "cuda" else "what a GPU would wait for"
    lines = [
        "fused: every stored parameter is one matrix. split: attention heads, and gate and up, each by "
        "themselves.",
        f"Muon: Megatron's TensorParallelMuon with {sso.msign_steps} Newton-Schulz steps "
        f"({sso.coefficient_type}), as ours; in split each of those matrices is a parameter of its own for "
        "it, so that all orthogonalise the same.",
        "AdamW: torch.optim.AdamW on the stored parameters, in both.",
        "/ Muon: ratio of the medians, and median of the ratios round by round.",
        f"flops: of matrix products. host syncs: {wait}. peak: memory that a step holds beyond its state; "
        "state: what lies there from step to step.",
        "Spectra: spike and tail of the momentum. SPECTRA-AdamW: AdamW's direction, clipped.",
    ]
    if settings.tp_size > 1:
        lines.append(
            "Times of the slowest rank, counts of the rank with the most; received: bytes that the usual "
            "algorithms bring to a rank."
        )
        if settings.model.experts:
            lines.append(
                "Routed experts and router are not cut: every rank holds and steps on all of them."
            )
    return lines


def print_table(settings: Settings, results: Results, console: Console | None = None) -> None:
    """Print a table for each layout: framed on a terminal, else plain columns however long."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200)
    model = settings.model
    where = machine(settings.device_type)
    console.print(
        f"{model.title} at hidden size {model.hidden}, {model.layers} layers; tensor parallelism "
        f"{settings.tp_size}; {where.get('gpu', where['cpu'])}; {settings.num_rounds} rounds, "
        f"Newton-Schulz products in {settings.sso.msign_precision}",
        highlight=False,
        soft_wrap=True,
    )
    columns = ["ms", "quartiles", "/ Muon", "by round", "Gflop", "trials", "host syncs"]
    columns += ["collectives", "received MB", "peak MB", "state MB"]
    for layout, by_name in results.items():
        counts = shapes(settings, layout)
        title = f"{layout}: {sum(count for _, count in counts)} matrices of {len(counts)} shapes"
        table = Table(title=title, title_justify="left", box=box.SIMPLE if console.is_terminal else None)
        table.add_column("optimizer", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
        for name, result in by_name.items():
            table.add_row(TITLES[name], *_cells(result))
        console.print(table)
        if not console.is_terminal:
            console.print()
    for note in notes(settings):
        console.print(note, highlight=False, soft_wrap=True)


def _cells(result: Result) -> list[str]:
    first, third = result["quartiles_seconds"]
    return [
        f"{1e3 * result['median_seconds']:.1f}",
        f"{1e3 * first:.1f} - {1e3 * third:.1f}",
        _or_dash(result["ratio_of_medians"], ".2f"),
        _or_dash(result["median_of_ratios"], ".2f"),
        f"{result['flops'] / 1e9:.2f}",
        _or_dash(result["trials_per_matrix"], ".2f"),
        str(result["host_syncs"]),
        str(sum(result["collectives"].values())),
        f"{result['received_bytes'] / 1e6:.2f}",
        f"{result['peak_bytes'] / 1e6:.1f}",
        f"{result['state_bytes'] / 1e6:.1f}",
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(path: Path, settings: Settings, results: Results) -> None:
    """Draw step times relative to Muon, or in milliseconds where Muon was not measured.

    Args:
        path: picture to write.
        settings: what was measured.
        results: with statistics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    width = 0.8 / len(results)
    for number, (layout, by_name) in enumerate(results.items()):
        muon = by_name["muon"]["median_seconds"] if "muon" in by_name else 1e-3
        heights = [result["median_seconds"] / muon for result in by_name.values()]
        quartiles = [result["quartiles_seconds"] for result in by_name.values()]
        whiskers = [
            [height - first / muon for height, (first, _) in zip(heights, quartiles, strict=True)],
            [third / muon - height for height, (_, third) in zip(heights, quartiles, strict=True)],
        ]
        places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(by_name))]
        bars = axis.bar(places, heights, width, yerr=whiskers, capsize=2, label=layout)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
        titles = [TITLES[name].replace(", ", "\n") for name in by_name]
    axis.set_xticks(range(len(titles)), titles, fontsize=8)
    model = settings.model
    axis.set(
        ylabel="step time / Muon" if "muon" in settings.optimizers else "step time (ms)",
        title=f"{model.title}, hidden size {model.hidden}, {model.layers} layers, TP {settings.tp_size}",
    )
    axis.legend()
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
