"""Records of a run: losses, spectral norms and a closing summary, in a folder of plain files.

``metrics.jsonl`` gets one line for each iteration; at Megatron's ``--log-interval`` lines also hold
the spectral norms, and at ``--log-spectral-criterion`` the criterion of each weight. ``summary.json`` is
written when training has ended.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sso_megatron.linalg.spectral_norm import spectral_norm
from sso_megatron.mcore import compat, criterion_report
from sso_megatron.mcore.arguments import config_from
from sso_megatron.mcore.criterion import Criterion
from sso_megatron.mcore.criterion import rows as criterion_rows
from sso_megatron.mcore.registration import spectral_parts
from sso_megatron.optimizers.sso import SSO


def install() -> None:
    """Hook into Megatron's ``pretrain``, which then keeps records if ``--spectral-run-dir`` is given."""
    import megatron.training
    from megatron.training import training

    # A script takes pretrain from either module.
    compat.wrap(training, "pretrain", _with_records)
    megatron.training.pretrain = training.pretrain


def _with_records(original: Callable[..., Any]) -> Callable[..., Any]:
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, training

        options = get_args()
        if not getattr(options, "spectral_run_dir", None):
            return original(*args, **kwargs)
        criterion = None
        if options.log_spectral_criterion:
            criterion = Criterion(options.log_spectral_criterion, config_from(options, "spectral"))
            compat.wrap(training, "train_step", criterion.around_train_step)
        recorder = Recorder(Path(options.spectral_run_dir), options.log_interval, criterion)
        for name in ("train", "training_log", "evaluate", "evaluate_and_print_results"):
            compat.wrap(training, name, getattr(recorder, f"around_{name}"))
        try:
            result = original(*args, **kwargs)
        except SystemExit as stop:  # how --exit-interval and its like end Megatron's loop
            if not stop.code:
                # Whoever asked to stop is waiting: no measurement.
                recorder.finish(measure=False)
            raise
        recorder.finish(measure=True)
        return result

    return pretrain


class Recorder:
    """Collects on every rank and writes on rank 0.

    Collectives: one gather of objects over the world at every ``log_interval``; in ``finish`` two more
    and those of ``SSO.retracted``.
    """

    def __init__(self, folder: Path, log_interval: int, criterion: Criterion | None) -> None:
        """Take the folder to write to, which must exist on rank 0, and what else to record."""
        self.folder = folder
        self.log_interval = log_interval
        self.criterion = criterion
        self.optimizers: list[SSO] = []
        self.losses: list[tuple[int, Any]] = []  # this rank's, not written yet
        self.loss_curve: list[float] = []
        self.val_loss: float | None = None  # only the last pipeline stage ever has one
        self.seconds = 0.0
        self._is_test = False
        self.iterations = 0

    def around_train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Time the training loop, evaluation inside it included."""

        def train(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Megatron drops its optimizer when training ends; finish() still needs it.
            self.optimizers = [part for part in spectral_parts(optimizer) if isinstance(part, SSO)]
            began = time.monotonic()
            try:
                return original(forward_step, model, optimizer, *args, **kwargs)
            finally:
                self.seconds = time.monotonic() - began

        return train

    def around_training_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Keep each iteration's loss on the device; write at the interval."""

        def training_log(loss_dict: Any, total: Any, lr: Any, iteration: int, *a: Any, **k: Any) -> Any:
            loss = loss_dict.get("lm loss", next(iter(loss_dict.values()), None))
            self.losses.append((iteration, loss))
            if iteration % self.log_interval == 0 or iteration == 1:
                self._write(lr)
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
                self.val_loss = float(result[0]["lm loss"])
            return result

        return evaluate

    def _write(self, lr: float | None = None) -> None:
        mine = {
            "losses": [(i, float(loss)) for i, loss in self.losses if loss is not None],
            "spectra": spectra(self.optimizers),
            "criterion": self.criterion.take_parts() if self.criterion else {},
        }
        self.losses.clear()
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, mine)
        # Only the last pipeline stage has losses; each of its ranks has the same.
        losses: list[tuple[int, float]] = next(
            (part["losses"] for part in everywhere if part["losses"]), []
        )
        if not losses:
            return
        self.loss_curve += [loss for _, loss in losses]
        self.iterations = losses[-1][0]
        if torch.distributed.get_rank() != 0:
            return
        lines: list[dict[str, Any]] = [
            {"iteration": i, "loss": loss, "time": time.time()} for i, loss in losses
        ]
        seen = {name: values for part in everywhere for name, values in part["spectra"].items()}
        if seen:
            ratios = [values["norm_over_radius"] for values in seen.values()]
            residuals = [abs(values["residual"]) for values in seen.values()]
            lines[-1] |= {
                "lr": lr,
                "largest_norm_over_radius": max(ratios),
                "median_norm_over_radius": statistics.median(ratios),
                "smallest_norm_over_radius": min(ratios),
                "largest_residual": max(residuals),
                "median_residual": statistics.median(residuals),
                "over_tolerance": sum(not values["converged"] for values in seen.values()),
            }
        for line in lines:
            parts = [part["criterion"].get(line["iteration"]) for part in everywhere]
            if any(parts):
                line["criterion"] = criterion_rows(part for part in parts if part)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            _append(self.folder / "metrics.jsonl", text)
        except OSError as error:  # a full disk must not end the training
            print(f"sso_megatron: records up to iteration {losses[-1][0]} not written: {error}", flush=True)

    def finish(self, measure: bool) -> None:
        """Write ``summary.json``; every rank must call it.

        Args:
            measure: look at the trained weights for ``max_radius_error``.
        """
        self._write()
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        mine = (max_radius_error(self.optimizers) if measure else None, self.val_loss)
        torch.distributed.all_gather_object(everywhere, mine)
        errors = [error for error, _ in everywhere if error is not None]
        if torch.distributed.get_rank() != 0:
            return
        summary = {
            "first_loss": self.loss_curve[0] if self.loss_curve else None,
            "last_loss": self.loss_curve[-1] if self.loss_curve else None,
            "val_loss": next((loss for _, loss in everywhere if loss is not None), None),
            "max_radius_error": max(errors, default=None),
            "iterations": self.iterations,
            "seconds": round(self.seconds, 1),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary) + "\n")
        if self.criterion:
            criterion_report.show(self.folder)


def _append(path: Path, text: str) -> None:
    """Add whole lines, also after one that a killed run has left unfinished."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())


def spectra(optimizers: Iterable[SSO]) -> dict[str, dict[str, float]]:
    """What the last step saw of each logical matrix on this rank, by name.

    ``norm_over_radius``: ``||W||_2 / R`` before retraction; ``residual``: ``<Theta, Phi>`` before it was
    removed; ``converged``: whether that was within the solver's tolerance. One host synchronisation
    a batch.
    """
    found = {}
    for optimizer in optimizers:
        for batch in optimizer.batches:
            if batch.stats is None:
                continue
            columns = (
                batch.stats.sigma / batch.cache.radius,
                batch.stats.residual,
                batch.stats.converged,
            )
            rows = torch.stack([column.float() for column in columns], dim=1).tolist()
            for member, (ratio, residual, converged) in zip(batch.here, rows, strict=True):
                found[member.name] = {
                    "norm_over_radius": ratio,
                    "residual": residual,
                    "converged": converged,
                }
    return found


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
