"""Measurements for ``--log-spectral-metrics``: what a step does to every weight, and the model's health."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from sso_megatron.mcore.metrics import activations as activation_meter
from sso_megatron.mcore.metrics import weights as weight_meter
from sso_megatron.mcore.metrics.activations import ActivationMeter
from sso_megatron.mcore.metrics.rank_gather import RankGather
from sso_megatron.mcore.metrics.weights import WeightMeter
from sso_megatron.mcore.optimizer.registration import spectral_optimizers
from sso_megatron.mcore.parameters.devices import device_of
from sso_megatron.runs.tables import Tables


class Metrics:
    """Measures every ``interval``-th iteration on the device, and does not change other iterations.

    Collectives: that of ``RankGather`` at the first measured iteration, and those of
    ``optimizers.measures.spectral_norms`` at each. The recorder gathers the numbers themselves.
    """

    def __init__(self, interval: int, sees_activations: bool) -> None:
        """Store the interval in iterations, and whether hooks see the model's forward passes."""
        self._interval = interval
        self._sees_activations = sees_activations
        self._meters: list[Any] = []
        self._gather: RankGather | None = None
        self._taken: Tensor | None = None

    @classmethod
    def from_options(cls, options: Any) -> "Metrics | None":
        """Return the metrics that Megatron's arguments ask for; None if they ask for none."""
        if not options.log_spectral_metrics:
            return None
        hidden = activation_meter.why_hidden(options)
        if hidden and options.rank == 0:
            print(f"sso_megatron: activations are not measured: {hidden}", flush=True)
        return cls(options.log_spectral_metrics, sees_activations=not hidden)

    def around_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's ``train_step`` so that a measured iteration's step is measured."""

        def train_step(*args: Any, iteration: int | None = None, **kwargs: Any) -> Any:
            if iteration is None or (iteration + 1) % self._interval:
                return original(*args, iteration=iteration, **kwargs)
            if not self._meters:
                self._find(model=args[2], optimizer=args[3])
            with contextlib.ExitStack() as stack:
                values: dict[str, Tensor] = {}
                for meter in self._meters:
                    meter.start()
                    stack.callback(_finish, meter, values)
                result = original(*args, iteration=iteration, **kwargs)
            assert self._gather is not None
            self._taken = self._gather.vector(values)
            return result

        return train_step

    def _find(self, model: Any, optimizer: Any) -> None:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import get_args

        groups = ProcessGroupCollection.use_mpu_process_groups()
        is_sharded = get_args().use_layer_wise_distributed_optimizer
        device = device_of(model)
        self._meters = [WeightMeter(spectral_optimizers(optimizer), is_sharded, groups, device)]
        if self._sees_activations:
            self._meters.append(ActivationMeter(model, groups, device))
        self._gather = RankGather(
            {name: s for meter in self._meters for name, s in meter.contributions.items()}
        )

    def take(self) -> Tensor | None:
        """Return this rank's numbers of the last step, once; None if it was not measured.

        All ranks have equally many numbers.
        """
        taken, self._taken = self._taken, None
        return taken

    def tables(self, gathered: np.ndarray) -> Tables:
        """Return the tables that the numbers of all ranks, ``(world, numbers)``, reduce to."""
        assert self._gather is not None
        reduced = self._gather.tables(gathered)
        tables = {"matrices": weight_meter.table(reduced["parts"], reduced["whole"])}
        if self._sees_activations:
            tables["layers"] = activation_meter.layer_table(reduced["layers"])
            tables["experts"] = activation_meter.expert_table(reduced["experts"])
        return tables


def _finish(meter: Any, values: dict[str, Tensor]) -> None:
    values |= meter.finish()
