"""Parameters as batches of matrices, and what is kept of them from step to step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.matrices.layout import ParameterLayout, whole
from sso_megatron.optimizers.batches import MatrixBatch
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.schedule import Schedule, make_schedule
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.shards import Cut

FindLayout = Callable[[Tensor], ParameterLayout]

MatrixState = dict[str, Tensor]
"""What an algorithm keeps of one logical matrix from step to step, by name."""


class MatrixOptimizer(torch.optim.Optimizer):
    """Groups, batches and state, in and out of checkpoints; ``SpectralOptimizer`` takes the steps."""

    state_names: tuple[str, ...] = ("momentum_buffer",)
    """What is kept of a parameter in its own shape, in ``state_dtype``."""
    takes_vectors = False
    """Whether parameters of fewer dimensions than a matrix are taken, too, which the subclass updates."""
    counts_steps = False
    """Whether the steps taken are counted: ``step`` in each parameter group, as FusedAdam has it, a 0-d
    float32 tensor on the device, or a number until the next step."""

    def __init__(
        self, params: ParamsT, *, lr: float | Tensor, shared: SpectralConfig, find_layout: FindLayout | None
    ) -> None:
        """See ``SpectralOptimizer``."""
        self.shared = shared
        self._find_layout = find_layout
        self._schedule: Schedule | None = None
        self._loaded: dict[str, MatrixState] = {}
        # Nothing but the learning rate is in the groups: a checkpoint restores groups, and what the
        # optimizer was built with must win over what an earlier run was built with.
        super().__init__(params, {"lr": lr})

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def state_dtype(self, param: Tensor) -> torch.dtype:
        """What a parameter's state is kept in: float32, or float64 for a float64 parameter."""
        return torch.promote_types(param.dtype, torch.float32)

    def init_state(self) -> None:
        """Make the state of every parameter and the count of steps, so that a checkpoint can be loaded."""
        for group in self.param_groups if self.counts_steps else ():
            step = group.get("step", 0)
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            if isinstance(step, Tensor):
                group["step"] = step.to(device, torch.float32)
            else:
                group["step"] = torch.full((), float(step), device=device)
        for param in self._parameters():
            state = self.state[param]
            for name in self.state_names:
                if name not in state:
                    state[name] = torch.zeros_like(param, dtype=self.state_dtype(param))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with ``spectral_state`` under ``spectral``."""
        return super().state_dict() | {"spectral": self.spectral_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load parameters' state, groups and what is kept of each matrix; see ``load_spectral_state``."""
        super().load_state_dict(state_dict)
        # torch rounds state to the parameter's dtype: take it from the source.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(saved, self._parameters(), strict=True):
            for name, source in state_dict["state"].get(index, {}).items():
                if isinstance(source, Tensor):
                    self.state[param][name] = source.to(param.device, self.state_dtype(param), copy=True)
        self.load_spectral_state(state_dict.get("spectral", {}))

    def spectral_state(self) -> dict[str, MatrixState]:
        """What is kept of each logical matrix beside its momentum, by its global name, on the host.

        Of those that this rank works on: with ``owner`` each rank of a tensor-parallel group has others.
        One transfer from the device a batch.
        """
        kept = dict(self._loaded)
        for batch in self._schedule.batches if self._schedule else ():
            if batch.cache is not None:
                names = [member.name for member in batch.here]
                kept |= dict(zip(names, self.matrix_states(batch), strict=True))
        return kept

    def load_spectral_state(self, states: dict[str, MatrixState]) -> None:
        """Start from what ``spectral_state`` gave; what is missing or does not fit is found anew."""
        self.reset_caches()
        self._loaded = dict(states)

    def take_loaded(self, batch: MatrixBatch) -> list[MatrixState | None]:
        """The loaded state of each of ``batch.here``, which is not kept any longer."""
        states = {member.name: self._loaded.pop(member.name, None) for member in batch.members}
        return [states[member.name] for member in batch.here]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; batches are made anew.

        Raises:
            ValueError: a parameter that is no matrix, or a setting outside its rule.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self._find_layout is not None, self.takes_vectors)
        except ValueError:
            self.param_groups.pop()
            raise
        self._loaded, self._schedule = self.spectral_state(), None

    def reset_caches(self) -> None:
        """Forget what is known of the weights' spectra; call it after editing weights by hand."""
        self._schedule, self._loaded = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: without batches, hooks and a scheduler's ``step``, which are this one's."""
        own = {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }
        return own | {"_schedule": None, "_loaded": self.spectral_state()}

    @property
    def batches(self) -> list[MatrixBatch]:
        """Batches of logical matrices; those of cut ones in the same order on every rank of their group."""
        return self.schedule.batches

    @property
    def schedule(self) -> Schedule:
        """What a step does, in its order."""
        # Made late: Megatron puts fp32 master weights into the groups after construction.
        if self._schedule is None:
            self._schedule = make_schedule(self.param_groups, self._layout, self.shared, self)
        return self._schedule

    def _layout(self, group: dict[str, Any], position: int) -> ParameterLayout:
        param = group["params"][position]
        if self._find_layout is not None:
            return self._find_layout(param)
        names = group.get("param_names")
        if names:
            return ParameterLayout(names[position], (whole(param.shape),))
        index = next(i for i, candidate in enumerate(self.param_groups) if candidate is group)
        return ParameterLayout(f"param_groups[{index}].params[{position}]", (whole(param.shape),))

    def matrix_states(self, batch: MatrixBatch) -> list[MatrixState]:
        """What is kept of each of ``batch.here``: tensors of their own, on the host."""
        raise NotImplementedError

    def fits(self, batch: MatrixBatch, state: MatrixState) -> bool:
        """Whether ``matrix_states`` of another layout or setting can be gone on with in this one."""
        raise NotImplementedError

    def warm_state(self, shape: tuple[int, int]) -> MatrixState:
        """A state that a step can go on from, whose values mean nothing: for counting what a step does.

        Empty where a start from the weights costs little.
        """
        return {}

    def polar_work(self) -> PolarWork:
        """What a step on one matrix does, for the cost model that chooses placements."""
        raise NotImplementedError

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that ``update_batch_`` takes for one whole matrix, with its W and N."""
        raise NotImplementedError

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """The same for a matrix whose largest shard this rank holds, and others the rest."""
        raise NotImplementedError

    def thin_sums(self, cut: Cut) -> tuple[int, ...] | None:
        """Bytes of a matrix in each all-reduce of a step where products with it are thin, else None.

        Cut matrices of such an algorithm stay where they are, unless ``tp_mode`` asks for another way.
        """
        return None


def _check_lr(lr: float | Tensor, params: list[Tensor]) -> None:
    if isinstance(lr, Tensor):
        is_number = lr.ndim == 0 and lr.is_floating_point()
        if not is_number or any(lr.device != param.device for param in params):
            raise ValueError(
                f"lr={lr!r} must be a float, or a floating-point tensor of shape () on the device of its "
                "parameters"
            )
    elif isinstance(lr, bool) or not isinstance(lr, int | float):
        raise ValueError(f"lr={lr!r} must be a float, or a floating-point tensor of shape ()")
    if not 0 <= lr < math.inf:  # of a tensor the one look at its value: steps do not wait for the device
        raise ValueError(
            f"lr={lr!r} must not be negative, and must be finite; what to start from is in docs/algorithms"
        )


def _check_group(group: dict[str, Any], has_layouts: bool, takes_vectors: bool) -> None:
    for param in group["params"]:
        # A layout may see matrices in a tensor of more dimensions, such as packed experts.
        is_odd = (param.ndim < 2 and not takes_vectors) or (param.ndim > 2 and not has_layouts)
        if is_odd or param.numel() == 0:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is no matrix; give parameters that are "
                "not 2-D, and embeddings and the output layer, to torch.optim.AdamW"
            )
    _check_lr(group["lr"], group["params"])
    unread = {"momentum", "nesterov", "weight_decay"} & group.keys()
    if unread:
        names = ", ".join(sorted(unread))
        raise ValueError(f"{names} in a parameter group is not read; make an optimizer of its own for it")
