"""Hooks into Megatron's training loop that keep records of a run, where the command line asks for any."""

import sys
import time
from collections.abc import Callable
from typing import Any

from sso_megatron.mcore.compat import private_api
from sso_megatron.mcore.errors.collective_exit import exit_together
from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.metrics.recorder import UNHEALTHY, Recorder

Function = Callable[..., Any]

_TRAINING = "megatron.training.training"


def install() -> None:
    """Hook into Megatron's ``pretrain``, which then keeps records if the command line asks for any."""
    # A script takes pretrain from either module. The package may not be imported to its end: see plug_in.
    private_api.wrap(f"{_TRAINING}:pretrain", _with_records)
    package: Any = sys.modules["megatron.training"]
    package.pretrain = private_api.existing(f"{_TRAINING}:pretrain")


def _with_records(original: Function) -> Function:
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        options = get_args()
        if options.optimizer in OPTIMIZERS:
            private_api.wrap(f"{_TRAINING}:setup_model_and_optimizer", _ending_together)
        if not (options.spectral_run_dir or options.log_spectral_metrics):
            return original(*args, **kwargs)
        recorder = Recorder(options)
        for path, wrapper in LoopHooks(recorder).table().items():
            private_api.wrap(path, wrapper)
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


def _ending_together(original: Function) -> Function:
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        """Set up as Megatron does, and end all ranks with one line where the optimizer cannot be built.

        Collectives: Megatron's, and a barrier at the end.
        """
        with exit_together(errors=(ValueError,)):
            return original(*args, **kwargs)

    return setup_model_and_optimizer


class LoopHooks:
    """Wraps functions of Megatron's loop so that they report to a recorder.

    They return what Megatron's functions return, except that an unhealthy run exits.

    Collectives: those of the recorder's methods.
    """

    def __init__(self, recorder: Recorder) -> None:
        """Store the recorder of this run."""
        self._recorder = recorder
        self._is_test = False

    def table(self) -> dict[str, Callable[[Function], Function]]:
        """Return the methods that wrap Megatron's functions, by key of ``PRIVATE_NAMES``."""
        return {
            f"{_TRAINING}:train": self.train,
            f"{_TRAINING}:train_step": self.train_step,
            f"{_TRAINING}:training_log": self.training_log,
            f"{_TRAINING}:evaluate_and_print_results": self.evaluate_and_print_results,
            f"{_TRAINING}:evaluate": self.evaluate,
            f"{_TRAINING}:checkpoint_and_decide_exit": self.checkpoint_and_decide_exit,
        }

    def train(self, original: Function) -> Function:
        """Report model and optimizer before the training loop, and how long it took, with evaluations."""

        def train(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._recorder.start(model, optimizer)
            began = time.monotonic()
            try:
                return original(forward_step, model, optimizer, *args, **kwargs)
            finally:
                self._recorder.seconds = time.monotonic() - began

        return train

    def train_step(self, original: Function) -> Function:
        """Wrap the step with every instrument; each decides which steps it measures."""
        for instrument in self._recorder.instruments:
            original = instrument.around_train_step(original)
        # A function of its own even without instruments: Megatron's own is not to be marked as wrapped.
        return lambda *args, **kwargs: original(*args, **kwargs)

    def training_log(self, original: Function) -> Function:
        """Report each iteration before Megatron logs it."""

        def training_log(losses: Any, total: Any, lr: Any, iteration: int, *a: Any, **k: Any) -> Any:
            _, _, is_skipped, grad_norm, *_ = a
            loss = losses.get("lm loss", next(iter(losses.values()), None))
            self._recorder.add(iteration, loss, lr, grad_norm, bool(is_skipped))
            return original(losses, total, lr, iteration, *a, **k)

        return training_log

    def evaluate_and_print_results(self, original: Function) -> Function:
        """Note whether Megatron evaluates the test set, which it does after the validation set."""

        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._is_test = "test set" in prefix
            return original(prefix, *args, **kwargs)

        return evaluate_and_print_results

    def evaluate(self, original: Function) -> Function:
        """Report the loss of the validation set; only the last pipeline stage ever has one."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not self._is_test and result[0] and "lm loss" in result[0]:
                self._recorder.val_loss = float(result[0]["lm loss"])
            return result

        return evaluate

    def checkpoint_and_decide_exit(self, original: Function) -> Function:
        """End the loop of an unhealthy run as ``--exit-interval`` would, but without a checkpoint."""

        def checkpoint_and_decide_exit(*args: Any, **kwargs: Any) -> Any:
            return True if self._recorder.has_stopped else original(*args, **kwargs)

        return checkpoint_and_decide_exit
