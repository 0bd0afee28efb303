"""Takes the steps that ``sso-megatron bench`` compares: times them in turn, then counts one of each."""

import gc
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import track

from sso_megatron.cli.bench.meters import Collectives, Flops, HostSyncs, PeakMemory
from sso_megatron.cli.bench.models import Model, stored_parameters
from sso_megatron.cli.bench.optimizers import (
    COPIES,
    Contestant,
    Gradients,
    Setup,
    import_megatron,
    make_contestants,
)
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig
from sso_megatron.updates.sso import SSOStats

Result = dict[str, Any]
"""Maps names to what was measured of one optimizer; see ``_count`` and ``_merged``."""


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        model: the model whose matrices are stepped on.
        optimizers: names in ``TITLES`` of ``bench.optimizers``.
        layouts: ``fused``, ``split`` or both.
        num_rounds: timed rounds, in each of which every optimizer takes one step.
        num_warmup: rounds before the timed ones.
        tp_size: number of ranks, over which the matrices are sharded.
        sso: settings of our optimizers; those of Newton-Schulz hold for Muon too.
        shared: our placement under tensor parallelism.
        device_type: ``cuda`` or ``cpu``.
    """

    model: Model
    optimizers: tuple[str, ...]
    layouts: tuple[str, ...]
    num_rounds: int
    num_warmup: int
    tp_size: int
    sso: SSOConfig
    shared: SpectralConfig
    device_type: str


def bytes_needed(settings: Settings) -> int:
    """Return a rank's memory in bytes: weights and states of all optimizers, gradients, and a step's."""
    shapes = [stored.local_shape(settings.tp_size) for stored in stored_parameters(settings.model)]
    model_bytes = 4 * sum(rows * columns for rows, columns in shapes)
    # One for the gradients, one for the temporary memory of a step of torch's AdamW or of ours.
    copies = 2 + sum(COPIES[name] for name in settings.optimizers)
    return copies * model_bytes + min(12 * model_bytes, settings.shared.workspace_mib << 20)


def measure(settings: Settings, folder: Path) -> dict[str, dict[str, Result]]:
    """Measure on as many ranks as asked for.

    Args:
        settings: what to measure.
        folder: an empty folder, for the files that the ranks exchange.

    Returns:
        Results by layout and optimizer.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the others were ended.
    """
    if settings.tp_size == 1:
        _run_rank(0, settings, folder)
    else:
        # A fork has Megatron imported already, but CUDA allows none.
        start_method = "spawn" if settings.device_type == "cuda" else "fork"
        if start_method == "fork":
            import_megatron()
        mp.start_processes(_run_rank, (settings, folder), settings.tp_size, start_method=start_method)
    found: dict[str, dict[str, Result]] = json.loads((folder / "results.json").read_text())
    return found


def _run_rank(rank: int, settings: Settings, folder: Path) -> None:
    device = torch.device(f"cuda:{rank}" if settings.device_type == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.tp_size > 1:
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.tp_size))
        store = f"file://{folder}/store"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=settings.tp_size)
    results = {layout: _measure_layout(layout, settings, rank, device) for layout in settings.layouts}
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    if settings.tp_size > 1:
        dist.destroy_process_group()


def _measure_layout(layout: str, settings: Settings, rank: int, device: torch.device) -> dict[str, Result]:
    """Return every optimizer's results, merged over the ranks. Collective: one all-gather of objects."""
    setup = Setup(
        model=settings.model,
        is_split=layout == "split",
        sso=settings.sso,
        shared=settings.shared,
        device=device,
        tp_group=dist.group.WORLD if settings.tp_size > 1 else None,
        tp_size=settings.tp_size,
        tp_rank=rank,
    )
    stored = list(stored_parameters(settings.model))
    gradients = Gradients(setup, stored)
    contestants = make_contestants(settings.optimizers, setup, stored, gradients)
    results: dict[str, Result] = {name: {"seconds": [], "num_trials": []} for name in contestants}
    num_rounds = settings.num_warmup + settings.num_rounds
    # On a terminal a bar, drawn between rounds: one that draws itself would be measured too.
    console = Console(stderr=True)
    for number in track(
        range(num_rounds),
        f"{layout}, rounds",
        console=console,
        auto_refresh=False,
        transient=True,
        disable=rank > 0 or not console.is_terminal,
    ):
        gradients.fill_(number)
        order = list(contestants)
        start = number % len(order)  # no optimizer always finds the caches that the same other left
        for name in order[start:] + order[:start]:
            seconds = _time_step(contestants[name], device)
            if number >= settings.num_warmup:
                results[name]["seconds"].append(seconds)
                results[name]["num_trials"] += _trials(contestants[name])
    gradients.fill_(num_rounds)
    for name, contestant in contestants.items():
        results[name] |= _count(contestant, device)
    by_rank: list[Any] = [results]
    if settings.tp_size > 1:
        by_rank = [None] * settings.tp_size
        dist.all_gather_object(by_rank, results)
    del contestants, contestant, gradients, setup
    gc.collect()
    return {name: _merged([of_rank[name] for of_rank in by_rank]) for name in results}


def _time_step(contestant: Contestant, device: torch.device) -> float:
    """Return the wall-clock seconds of one step, begun together on all ranks, until the device is done."""
    if dist.is_initialized():
        dist.barrier()
    _wait(device)
    start = time.perf_counter()
    contestant.step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trials(contestant: Contestant) -> list[int]:
    """Return the trials of the last step, for each matrix that this rank worked on."""
    stats = [batch.stats for batch in contestant.batches if isinstance(batch.stats, SSOStats)]
    return [trials for one in stats for trials in one.num_trials.tolist()]


def _count(contestant: Contestant, device: torch.device) -> Result:
    """Return what one more step of a rank does, as counts."""
    host_tensors = contestant.host_tensors()
    with Flops() as flops, PeakMemory(device) as memory, Collectives() as collectives:
        with HostSyncs(device, host_tensors) as syncs:
            contestant.step()
        _wait(device)
    batches = contestant.batches
    stats = [b.stats for b in batches if isinstance(b.stats, SSOStats) and len(b.here)]
    residuals = [one.residual.abs().max().item() for one in stats]
    placements: Counter[str] = Counter()
    for batch in batches:
        placements[batch.mode] += len(batch.here)
    return {
        "flops": flops.total,
        "peak_bytes": memory.peak_bytes,
        "state_bytes": contestant.state_bytes(),
        "collectives": dict(collectives.calls),
        "received_bytes": collectives.received_bytes,
        "host_syncs": syncs.count,
        "host_sync_sources": dict(syncs.sources),
        "max_residual": max(residuals, default=None),
        "placements": dict(placements),
    }


def _merged(by_rank: list[Result]) -> Result:
    """Merge the results of all ranks: times of the slowest, counts of the rank with the most."""
    merged: Result = {}
    for key in ("flops", "peak_bytes", "state_bytes", "received_bytes", "host_syncs"):
        merged[key] = max(result[key] for result in by_rank)
    for key in ("collectives", "host_sync_sources"):
        merged[key] = max((result[key] for result in by_rank), key=lambda counts: sum(counts.values()))
    merged["seconds"] = [max(times) for times in zip(*(r["seconds"] for r in by_rank), strict=True)]
    trials = [count for result in by_rank for count in result["num_trials"]]
    merged["trials_per_matrix"] = sum(trials) / len(trials) if trials else None
    residuals = [r["max_residual"] for r in by_rank if r["max_residual"] is not None]
    merged["max_residual"] = max(residuals, default=None)
    merged["placements_by_rank"] = [result["placements"] for result in by_rank]
    return merged
