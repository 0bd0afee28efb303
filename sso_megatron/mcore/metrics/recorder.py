"""Records of a run: losses, measurements and a closing summary.

Losses of every iteration and what ``--log-spectral-metrics`` measured travel together, in one all-gather at
``--log-interval`` and at each measured iteration. ``runs.writer`` says what is written.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sso_megatron.linalg.spectral_norm import spectral_norm
from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.flags.parser import config_from
from sso_megatron.mcore.metrics import loggers
from sso_megatron.mcore.metrics.criterion import Criterion
from sso_megatron.mcore.metrics.criterion import rows as criterion_rows
from sso_megatron.mcore.metrics.run_description import describe
from sso_megatron.mcore.metrics.step_metrics import Metrics
from sso_megatron.mcore.optimizer.registration import spectral_optimizers
from sso_megatron.optimizers.sso import SSO
from sso_megatron.runs import criterion_table
from sso_megatron.runs.alarms import Alarms, lines
from sso_megatron.runs.tables import Tables, headlines
from sso_megatron.runs.writer import RunFiles

Line = dict[str, Any]

_HOOKED = ("train", "training_log", "evaluate", "evaluate_and_print_results", "checkpoint_and_decide_exit")


UNHEALTHY = 3
"""Exit code of all ranks after ``--spectral-health stop``."""


def install() -> None:
    """Hook into Megatron's ``pretrain``, which then keeps records if the command line asks for any."""
    # A script takes pretrain from either module. The package may not be imported to its end: see plug_in.
    private_api.wrap("megatron.training.training:pretrain", _with_records)
    package: Any = sys.modules["megatron.training"]
    package.pretrain = private_api.existing("megatron.training.training:pretrain")


def _with_records(original: Callable[..., Any]) -> Callable[..., Any]:
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        options = get_args()
        if not (options.spectral_run_dir or options.log_spectral_metrics):
            return original(*args, **kwargs)
        recorder = Recorder(options)
        private_api.wrap("megatron.training.training:train_step", recorder.around_train_step)
        for name in _HOOKED:
            private_api.wrap(f"megatron.training.training:{name}", getattr(recorder, f"around_{name}"))
        try:
            result = original(*args, **kwargs)
        except SystemExit as stop:  # how --exit-interval and its like end Megatron's loop
            if not stop.code:
                # Whoever asked to stop is waiting: no measurement.
                recorder.finish(measure=False)
            if recorder.has_stopped:
                raise SystemExit(UNHEALTHY) from None
            raise
        recorder.finish(measure=True)
        return result

    return pretrain


class Recorder:
    """Collects on every rank; rank 0 writes the files, and Megatron's rank of the boards to them.

    Collectives: at ``--log-interval`` and at measured iterations one all-gather of numbers over the world;
    with ``--log-spectral-criterion`` one of objects where it was measured; in ``finish`` one of objects and
    those of ``SSO.retracted``; those of ``Metrics`` and ``Criterion``.
    """

    def __init__(self, options: Any) -> None:
        """Take Megatron's arguments; the folder of records exists on rank 0."""
        self._log_interval = options.log_interval
        self._metrics, self._criterion = None, None
        if options.log_spectral_metrics:
            hidden = _why_activations_are_hidden(options)
            if hidden and options.rank == 0:
                print(f"sso_megatron: activations are not measured: {hidden}", flush=True)
            self._metrics = Metrics(options.log_spectral_metrics, sees_activations=not hidden)
        if options.log_spectral_criterion:
            self._criterion = Criterion(options.log_spectral_criterion, config_from(options, "spectral"))
        self._health, self._alarms = options.spectral_health, Alarms()
        self._shown: set[str] = set()
        self._files: RunFiles | None = None
        if options.spectral_run_dir and options.rank == 0:
            self._files = RunFiles(Path(options.spectral_run_dir))
        self._options, self._has_folder = options, bool(options.spectral_run_dir)
        self._optimizers: list[SSO] = []
        self._steps: list[tuple[int, float, Any]] = []  # iteration, time, loss; not written yet
        self._loss_curve: list[float] = []
        self._val_loss: float | None = None  # only the last pipeline stage ever has one
        self._seconds = 0.0
        self._is_test = False
        self._last_iteration = 0
        self._num_skipped = 0  # of the last measured iterations
        self._stopped: str | None = None

    @property
    def has_stopped(self) -> bool:
        """Whether an alarm ends the run; with ``stop`` the same on every rank."""
        return self._stopped is not None

    def around_train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Time the training loop, evaluation inside it included."""

        def train(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Megatron drops its optimizer when training ends; finish() still needs it.
            self._optimizers = [part for part in spectral_optimizers(optimizer) if isinstance(part, SSO)]
            if self._files is not None:  # not before: Megatron has just found the number of iterations
                self._files.write_run(describe(self._options))
            began = time.monotonic()
            try:
                return original(forward_step, model, optimizer, *args, **kwargs)
            finally:
                self._seconds = time.monotonic() - began

        return train

    def around_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Measure what is to be measured."""
        for measuring in (self._criterion, self._metrics):
            if measuring is not None:
                original = measuring.around_train_step(original)
        return lambda *args, **kwargs: original(*args, **kwargs)

    def around_training_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Keep each iteration's loss on the device; write at the interval."""

        def training_log(loss_dict: Any, total: Any, lr: Any, iteration: int, *a: Any, **k: Any) -> Any:
            loss = loss_dict.get("lm loss", next(iter(loss_dict.values()), None))
            self._steps.append((iteration, time.time(), loss))
            is_measured = self._metrics is not None and self._metrics.has_taken
            if iteration % self._log_interval == 0 or iteration == 1 or is_measured:
                _, _, is_skipped, grad_norm, *_ = a
                norm = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
                self._write({"lr": lr, **norm}, bool(is_skipped))
            return original(loss_dict, total, lr, iteration, *a, **k)

        return training_log

    def around_evaluate_and_print_results(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Note whether it is the test set that is evaluated: Megatron does that last."""

        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._is_test = "test set" in prefix
            return original(prefix, *args, **kwargs)

        return evaluate_and_print_results

    def around_evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Keep the loss of the last evaluation of the validation set."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not self._is_test and result[0] and "lm loss" in result[0]:
                self._val_loss = float(result[0]["lm loss"])
            return result

        return evaluate

    def around_checkpoint_and_decide_exit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Have Megatron's loop end as it does at ``--exit-interval``, but without a checkpoint."""

        def checkpoint_and_decide_exit(*args: Any, **kwargs: Any) -> Any:
            return True if self.has_stopped else original(*args, **kwargs)

        return checkpoint_and_decide_exit

    def _write(self, scalars: Line, is_skipped: bool = False) -> None:
        """Bring the numbers of all ranks together, and write them where this rank does.

        Args:
            scalars: of the last iteration, the same on every rank.
            is_skipped: whether its step was not taken.
        """
        steps, self._steps = self._steps, []
        measured = self._metrics.take() if self._metrics else None
        if not steps:
            return
        head = _losses(steps)
        vector = head if measured is None else torch.cat([head, measured])
        gathered = vector.new_empty(dist.get_world_size() * vector.numel())
        dist.all_gather_into_tensor(gathered, vector)
        writers = loggers.writers() if measured is not None else []
        criterion = self._gather_criterion()
        self._last_iteration = steps[-1][0]
        decides = measured is not None and self._health == "stop"
        if not (writers or decides or dist.get_rank() == 0):
            return
        numbers = gathered.cpu().numpy().reshape(dist.get_world_size(), -1)
        written = self._lines(steps, numbers[:, : head.numel()])
        written[-1] |= scalars
        for line in written:
            if line["iteration"] in criterion:
                line["criterion"] = criterion[line["iteration"]]
        if measured is not None:
            assert self._metrics is not None
            tables = self._metrics.tables(numbers[:, head.numel() :])
            self._num_skipped = self._num_skipped + 1 if is_skipped else 0
            self._report(written[-1], tables, writers)
        if self._files is not None:
            self._files.append_lines(written)

    def _lines(self, steps: list[tuple[int, float, Any]], losses: np.ndarray) -> list[Line]:
        """A line for each iteration; only the last pipeline stage has losses, each of its ranks all."""
        written: list[Line] = []
        for k, (iteration, when, _) in enumerate(steps):
            line: Line = {"iteration": iteration, "time": when}
            known = losses[losses[:, 2 * k + 1] > 0, 2 * k]
            if known.size:
                line["loss"] = float(known[0])
                self._loss_curve.append(line["loss"])
            written.append(line)
        return written

    def _report(self, line: Line, tables: Tables, writers: list[Any]) -> None:
        """Put headlines and alarms into a line, write the measurements, and tell of new alarms."""
        iteration = line["iteration"]
        # One step that Megatron has skipped is over; its forward pass may well have been sick.
        judged = self._health != "off" and self._num_skipped != 1
        alarms = self._alarms.check(iteration, tables) if judged else []
        line |= {"headlines": headlines(tables), "alarms": lines(alarms)}
        for write in writers:
            write(loggers.numbers(tables), iteration)
        if self._files is not None:
            self._files.append_measures(iteration, line["time"], line["lr"], tables)
        if dist.get_rank() == 0:
            for text in lines([a for a in alarms if f"{a.kind} {a.module}" not in self._shown]):
                print(f"sso_megatron: iteration {iteration}: health: {text}", flush=True)
        self._shown = {f"{a.kind} {a.module}" for a in alarms}
        if alarms and self._health == "stop":
            self._stopped = alarms[0].text
            if dist.get_rank() == 0:
                print(
                    "sso_megatron: --spectral-health stop: all ranks end after this iteration, without a "
                    f"checkpoint, with exit code {UNHEALTHY}",
                    flush=True,
                )

    def _gather_criterion(self) -> dict[int, Any]:
        """The criterion by iteration, if it was measured since the last call."""
        mine = self._criterion.take() if self._criterion else {}
        if not mine:
            return {}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        return {iteration: criterion_rows(parts[iteration] for parts in everywhere) for iteration in mine}

    def finish(self, measure: bool) -> None:
        """Write ``summary.json``; every rank must call it.

        Args:
            measure: look at the trained weights for ``max_radius_error``.
        """
        self._write({})
        everywhere: list[Any] = [None] * dist.get_world_size()
        measure = measure and self._has_folder
        mine = (max_radius_error(self._optimizers) if measure else None, self._val_loss)
        dist.all_gather_object(everywhere, mine)
        if self._files is None:
            return
        errors = [error for error, _ in everywhere if error is not None]
        summary = {
            "first_loss": self._loss_curve[0] if self._loss_curve else None,
            "last_loss": self._loss_curve[-1] if self._loss_curve else None,
            "val_loss": next((loss for _, loss in everywhere if loss is not None), None),
            "max_radius_error": max(errors, default=None),
            "iterations": self._last_iteration,
            "seconds": round(self._seconds, 1),
        }
        if self._stopped:
            summary["stopped"] = self._stopped
        if not self._last_iteration:  # resumed at its end: what the part before has told still holds
            summary |= self._files.read_summary()
        self._files.write_summary(summary | {"time": time.time()})
        if self._criterion:
            criterion_table.show(self._files.folder)


def _why_activations_are_hidden(options: Any) -> str | None:
    """What keeps hooks from seeing forward passes."""
    if getattr(options, "cuda_graph_impl", "none") != "none":
        return f"a replayed forward pass cannot be looked at (--cuda-graph-impl {options.cuda_graph_impl})"
    if options.overlap_moe_expert_parallel_comm:
        return "layers are called in parts (--overlap-moe-expert-parallel-comm)"
    return None


def _losses(steps: list[tuple[int, float, Any]]) -> torch.Tensor:
    """Of each iteration the loss, and whether this rank has one: ``(2 iterations,)``."""
    pairs = [torch.zeros(2, device="cuda") for _ in steps]
    for pair, (_, _, loss) in zip(pairs, steps, strict=True):
        if loss is not None:
            pair[0], pair[1] = loss, 1.0
    return torch.cat(pairs)


def max_radius_error(optimizers: Iterable[SSO]) -> float | None:
    """Largest ``| ||W||_2 - R | / R`` right after a retraction.

    By exact SVD in float64 up to a short side of 1024, beyond that by a long power iteration.
    Over this rank's logical matrices with the weights as they are; None where there is none. Every
    rank of a tensor-parallel group must call it.

    Collectives: those of ``SSO.retracted``.
    """
    errors = [
        abs(spectral_norm(matrix) - radius) / radius
        for optimizer in optimizers
        for _, matrix, radius in optimizer.retracted()
    ]
    return max(errors, default=None)
