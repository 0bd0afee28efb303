"""The recorder of a run, which gathers losses and measurements of all ranks and writes them.

Losses of every iteration and the measurements of ``--log-spectral-metrics`` are gathered together, in one
all-gather at ``--log-interval`` and at each measured iteration. ``runs.writer`` says what is written.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sso_megatron.mcore.metrics import loggers
from sso_megatron.mcore.metrics.criterion import Criterion
from sso_megatron.mcore.metrics.losses import PendingLosses, loss_lines, loss_vector
from sso_megatron.mcore.metrics.rank_gather import gather_objects, gather_vectors
from sso_megatron.mcore.metrics.run_description import describe
from sso_megatron.mcore.metrics.step_metrics import Metrics
from sso_megatron.mcore.optimizer.registration import spectral_optimizers
from sso_megatron.mcore.parameters.devices import device_of
from sso_megatron.optimizers.radius_error import max_radius_error
from sso_megatron.optimizers.sso import SSO
from sso_megatron.runs import criterion_table
from sso_megatron.runs.health_monitor import HealthMonitor
from sso_megatron.runs.summary import RunTotals, summarize
from sso_megatron.runs.tables import Tables, headlines
from sso_megatron.runs.writer import RunFiles

Line = dict[str, Any]
"""A line of ``metrics.jsonl``."""

UNHEALTHY = 3
"""Exit code of all ranks after ``--spectral-health stop``."""


class Recorder:
    """Collects losses and measurements on every rank; rank 0 writes files, the loggers' rank to loggers.

    Attributes:
        seconds: length of the training loop, once it has ended.
        val_loss: loss of the last evaluation of the validation set; None where this rank has none.
    """

    def __init__(self, options: Any) -> None:
        """Make the instruments that Megatron's arguments ask for; the run's folder must exist on rank 0."""
        self._options = options
        self._metrics = Metrics.from_options(options)
        self._criterion = Criterion.from_options(options)
        self._files: RunFiles | None = None
        if options.spectral_run_dir and options.rank == 0:
            self._files = RunFiles(Path(options.spectral_run_dir))
        self._health = HealthMonitor(options.spectral_health)
        self._losses, self._totals = PendingLosses(), RunTotals()
        self._optimizers: list[SSO] = []
        self._device: torch.device | None = None
        self.seconds = 0.0
        self.val_loss: float | None = None

    @property
    def instruments(self) -> list[Any]:
        """The instruments that measure training steps, the innermost first; each wraps ``train_step``."""
        return [instrument for instrument in (self._criterion, self._metrics) if instrument is not None]

    @property
    def has_stopped(self) -> bool:
        """Whether an alarm ends the run; with ``--spectral-health stop`` the same on every rank."""
        return self._health.stop_reason is not None

    def start(self, model: Any, optimizer: Any) -> None:
        """Store what is needed of model and optimizer, and write ``run.json``. No collective.

        Args:
            model: this rank's model chunks.
            optimizer: Megatron's optimizer. Megatron drops it when training ends, and ``finish`` needs it.
        """
        self._optimizers = [part for part in spectral_optimizers(optimizer) if isinstance(part, SSO)]
        self._device = device_of(model)
        if self._files is not None:  # not before: Megatron has just found the number of iterations
            self._files.write_run(describe(self._options))

    def add(
        self, iteration: int, loss: torch.Tensor | None, lr: Any, grad_norm: Any, is_skipped: bool
    ) -> None:
        """Keep an iteration's loss on the device; at the log interval, or if it was measured, write.

        Collectives: none, or when it writes one all-gather over the world, and one of objects if the
        criterion was measured since.

        Args:
            iteration: number of the iteration that has ended.
            loss: its loss on the device; None where this rank has none.
            lr: its learning rate.
            grad_norm: its gradient norm; None where Megatron has none.
            is_skipped: whether the optimizer did not take this step.
        """
        self._losses.add(iteration, loss)
        measured = self._metrics.take() if self._metrics else None
        if iteration % self._options.log_interval == 0 or iteration == 1 or measured is not None:
            norm = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
            self._write({"lr": lr, **norm}, measured, is_skipped)

    def finish(self, measure: bool) -> None:
        """Write the iterations that are left, and ``summary.json``; every rank must call it.

        Collectives: those of ``add`` when it writes; with ``measure`` those of ``max_radius_error``; one
        all-gather of objects over the world.

        Args:
            measure: whether to measure the trained weights by ``max_radius_error``.
        """
        self._write({})
        measure = measure and bool(self._options.spectral_run_dir)
        mine = (max_radius_error(self._optimizers) if measure else None, self.val_loss)
        everywhere = gather_objects(mine)
        if self._files is None:
            return
        summary = summarize(self._totals, everywhere, self.seconds, self._health.stop_reason)
        if not self._totals.iterations:  # resumed at its end: the summary of the part before still holds
            summary |= self._files.read_summary()
        self._files.write_summary(summary | {"time": time.time()})
        if self._criterion:
            criterion_table.show(self._files.folder)

    def _write(self, scalars: Line, measured: torch.Tensor | None = None, is_skipped: bool = False) -> None:
        """Gather the numbers of all ranks, and write them if this rank writes.

        Args:
            scalars: numbers of the last iteration, the same on every rank.
            measured: this rank's numbers of the last iteration; None if it was not measured.
            is_skipped: whether the optimizer did not take the last iteration's step.
        """
        iterations = self._losses.take()
        if not iterations:
            return
        assert self._device is not None
        losses = loss_vector(iterations, self._device)
        gathered = gather_vectors(losses if measured is None else torch.cat([losses, measured]))
        criterion = self._criterion.gather() if self._criterion else {}
        writers = loggers.writers() if measured is not None else []
        judges = measured is not None and self._health.can_stop
        if not (writers or judges or dist.get_rank() == 0):
            return
        numbers = gathered.cpu().numpy()
        lines = loss_lines(iterations, numbers[:, : losses.numel()])
        self._totals.add(lines)
        lines[-1] |= scalars
        for line in lines:
            if line["iteration"] in criterion:
                line["criterion"] = criterion[line["iteration"]]
        if measured is not None:
            assert self._metrics is not None
            self._report(lines[-1], self._metrics.tables(numbers[:, losses.numel() :]), is_skipped, writers)
        if self._files is not None:
            self._files.append_lines(lines)

    def _report(self, line: Line, tables: Tables, is_skipped: bool, writers: list[Any]) -> None:
        """Put headlines and alarms into a line, write the measurements, and print new alarms on rank 0."""
        iteration = line["iteration"]
        judgement = self._health.judge(iteration, tables, is_skipped)
        line |= {"headlines": headlines(tables), "alarms": judgement.alarms}
        for write in writers:
            write(loggers.numbers(tables), iteration)
        if self._files is not None:
            self._files.append_measures(iteration, line["time"], line["lr"], tables)
        if dist.get_rank() != 0:
            return
        for text in judgement.news:
            print(f"sso_megatron: iteration {iteration}: health: {text}", flush=True)
        if self.has_stopped:
            print(
                "sso_megatron: --spectral-health stop: all ranks end after this iteration, without a "
                f"checkpoint, with exit code {UNHEALTHY}",
                flush=True,
            )
