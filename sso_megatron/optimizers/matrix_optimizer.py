"""Parameters as batches of matrices, and their state from step to step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.matrices.layout import ParameterLayout, whole
from sso_megatron.optimizers.batches import MatrixBatch
from sso_megatron.optimizers.cached_state import CachedField, MatrixState, fits, restore_cache_, save_cache
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.schedule import Schedule, make_schedule
from sso_megatron.optimizers.settings import group_settings
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.shards import Cut, is_distributed_tensor

FindLayout = Callable[[Tensor], ParameterLayout]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GROUP_KEYS = frozenset(
    (
        *("params", "lr", "step", "param_names", "name", "names"),
        "differentiable",  # torch adds it to the defaults of what it has loaded
        # Of schedulers: torch's, then Megatron's with what its factory puts into every group.
        *("initial_lr", "swa_lr", "max_lr", "min_lr"),
        *("lr_mult", "wd_mult", "start_wd", "end_wd", "is_decoupled_lr", "is_expert_parallel"),
        *("default_config", "optimizer"),
    )
)
"""Keys of a parameter group that are no settings of the optimizer."""


class MatrixOptimizer(torch.optim.Optimizer):
    """Holds groups, batches and state, and saves and loads them; ``SpectralOptimizer`` takes the steps."""

    state_names: tuple[str, ...] = ("momentum_buffer",)
    """Names of the tensors that are kept for a parameter in its own shape, in ``state_dtype``."""
    takes_vectors = False
    """Whether parameters of fewer than two dimensions are accepted, too; the subclass updates them."""
    counts_steps = False
    """Whether the steps taken are counted: ``step`` in each parameter group, as FusedAdam has it, a 0-d
    float32 tensor on the device, or a number until the next step."""

    works_on_shards = False
    """Whether a step also takes this rank's rows of cut matrices, and sums over the others' by the batch's
    ``placement.all_reduce``. A step that does not gets whole matrices in every ``tp_mode``: ``auto`` never
    leaves shards where they are, and ``distributed`` is an error. (``blockwise`` calls each shard a whole
    matrix, for every optimizer.)"""
    workspace_copies = 16
    """Tensors of a matrix's size that a step on it may hold at once, its weight and direction included, for
    the defaults of ``workspace`` and ``cut_workspace``. No optimizer of this package takes as many."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor,
        config: Any,
        shared: SpectralConfig,
        find_layout: FindLayout | None,
    ) -> None:
        """Store the arguments, which ``SpectralOptimizer`` has completed, and make the parameter groups."""
        if shared.tp_mode == "distributed" and not self.works_on_shards:
            raise ValueError(
                f"tp_mode='distributed' leaves shards on their ranks, and {type(self).__name__} needs "
                "whole matrices; use auto, owner or duplicated"
            )
        self.config = config
        self.shared = shared
        self._own_settings: list[dict[str, Any]] = []
        self._find_layout = find_layout
        self._schedule: Schedule | None = None
        self._loaded: dict[str, MatrixState] = {}
        # Nothing but the learning rate is in the groups, a group's own settings neither: a checkpoint
        # restores groups, and what the optimizer was built with must win over what an earlier run was.
        super().__init__(params, {"lr": lr})

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def config_of(self, group: dict[str, Any]) -> Any:
        """Return the settings of a parameter group: ``config``, with what the group has for itself."""
        index = next(i for i, candidate in enumerate(self.param_groups) if candidate is group)
        own = self._own_settings[index]
        return _with_own(self.config, tuple(own.items())) if own else self.config

    def state_dtype(self, param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's state: float32, or float64 for a float64 parameter."""
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
        """Return torch's state dict, with ``spectral_state`` under the key ``spectral``."""
        return super().state_dict() | {"spectral": self.spectral_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of parameters, groups and logical matrices; see ``load_spectral_state``.

        Raises:
            ValueError: the state is another optimizer's.
        """
        self._refuse_other_state(state_dict)
        super().load_state_dict(state_dict)
        # torch rounds state to the parameter's dtype: take it from the source.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(saved, self._parameters(), strict=True):
            for name, source in state_dict["state"].get(index, {}).items():
                if isinstance(source, Tensor):
                    self.state[param][name] = source.to(param.device, self.state_dtype(param), copy=True)
        self.load_spectral_state(state_dict.get("spectral", {}))

    def _refuse_other_state(self, state_dict: dict[str, Any]) -> None:
        kept = {name for state in state_dict["state"].values() for name in state}
        is_complete = all(set(self.state_names) <= state.keys() for state in state_dict["state"].values())
        # Every scheduler of Megatron's writes a weight decay into its groups, which nobody reads.
        others = set().union(*state_dict["param_groups"]) - _GROUP_KEYS - {"weight_decay"}
        if not is_complete or others:
            found = ", ".join(sorted(kept | others)) or "nothing"
            raise ValueError(
                f"the state to load is another optimizer's: it has {found}, and {type(self).__name__} "
                f"keeps {', '.join(self.state_names)}; load the state of the same optimizer"
            )

    def spectral_state(self) -> dict[str, MatrixState]:
        """Return ``cached_fields`` of each logical matrix that this rank works on, by its global name.

        With ``owner`` each rank of a tensor-parallel group works on other matrices. The tensors are on the
        host, copied from the device batch by batch.
        """
        kept = dict(self._loaded)
        for batch in self._schedule.batches if self._schedule else ():
            if batch.cache is not None:
                names = [member.name for member in batch.here]
                states = save_cache(self.cached_fields(batch.shape), batch.cache, len(names))
                kept |= dict(zip(names, states, strict=True))
        return kept

    def load_spectral_state(self, states: dict[str, MatrixState]) -> None:
        """Go on from what ``spectral_state`` returned; what is missing or does not fit is found anew."""
        self.reset_caches()
        self._loaded = dict(states)

    def make_cache[C](self, batch: MatrixBatch, make: Callable[[bool], C]) -> C:
        """Make the cache of a batch from loaded state as far as that fits, and from ``make`` otherwise.

        The loaded state of its matrices is forgotten.

        Args:
            batch: it has no cache yet.
            make: returns a cache. Its argument says whether loaded state will overwrite all of it, so that
                nothing needs to be found.
        """
        loaded = {member.name: self._loaded.pop(member.name, None) for member in batch.members}
        states = [loaded[member.name] for member in batch.here]
        fields = self.cached_fields(batch.shape)
        cache = make(all(fits(fields, state) for state in states))
        restore_cache_(fields, cache, states)
        batch.cache = cache
        return cache

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch. The next step makes its batches anew.

        Raises:
            ValueError: a parameter that is no matrix, a setting outside its rule, or a key that is neither
                a setting that a group may have for itself nor a scheduler's.
        """
        known = group_settings(type(self.config))
        own = {name: param_group[name] for name in known if name in param_group}
        super().add_param_group({key: value for key, value in param_group.items() if key not in own})
        self._own_settings.append(own)
        try:
            _check_group(self.param_groups[-1], self._find_layout is not None, self.takes_vectors, known)
            dataclasses.replace(self.config, **own)  # checks their rules
        except ValueError:
            self._drop_last_group()
            raise
        self._loaded, self._schedule = self.spectral_state(), None

    def _drop_last_group(self) -> None:
        """Take back a parameter group that was found wrong after it had been added."""
        self.param_groups.pop()
        self._own_settings.pop()

    def reset_caches(self) -> None:
        """Forget what is known about the weights' spectra; call it after editing weights by hand."""
        self._schedule, self._loaded = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what copy and pickle take: batches, hooks and a scheduler's ``step`` are left out."""
        own = {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }
        return own | {"_schedule": None, "_loaded": self.spectral_state()}

    @property
    def batches(self) -> list[MatrixBatch]:
        """Batches of logical matrices; those of cut ones have the same order on every rank of a group."""
        return self.schedule.batches

    @property
    def schedule(self) -> Schedule:
        """The batches and exchanges of a step, in their order."""
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

    def cached_fields(self, shape: tuple[int, int]) -> tuple[CachedField, ...]:
        """Return what is kept for a matrix of this global shape beside its parameter's state; here nothing.

        An optimizer with fields calls ``make_cache`` for a batch whose ``cache`` is None.
        """
        return ()

    def fits(self, batch: MatrixBatch, state: MatrixState) -> bool:
        """Return whether a step on a matrix of the batch can go on from a state that any layout saved."""
        return fits(self.cached_fields(batch.shape), state)

    def warm_state(self, shape: tuple[int, int]) -> MatrixState:
        """Return a state that fits and whose values mean nothing, to count what a later step does."""
        return {field.key: field.placeholder() for field in self.cached_fields(shape)}

    def polar_work(self) -> PolarWork:
        """Return how often a step on one matrix iterates, for the cost model that chooses placements.

        By default one Newton-Schulz iteration of ``config.msign_steps`` steps, none without that setting.
        """
        num_steps = getattr(self.config, "msign_steps", 0)
        return PolarWork(min(1, num_steps), num_steps)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes that ``update_batch_`` takes for one whole matrix, its W and N included.

        By default ``workspace_copies`` of the matrix.
        """
        return self.workspace_copies * shape[0] * shape[1] * dtype.itemsize

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Return the bytes that ``update_batch_`` takes for a matrix's largest shard, its W and N included.

        By default ``workspace_copies`` of the shard, or of a square of the side that is not cut if that is
        larger, in float64: Gram matrices of that side are what is summed over ranks.
        """
        side = cut.shape[1 - cut.dim]
        return self.workspace_copies * max(max(cut.lengths) * side, side**2) * torch.float64.itemsize

    def thin_sums(self, cut: Cut) -> tuple[int, ...] | None:
        """Return the bytes of each all-reduce of a step on one matrix, if its products are thin, else None.

        Thin products are those with a block of few columns. Shards of such an algorithm stay on their
        ranks, unless ``tp_mode`` names another placement.
        """
        return None


@functools.cache
def _with_own(config: Any, own: tuple[tuple[str, Any], ...]) -> Any:
    """Return a configuration with a group's own settings, the same object each time."""
    return dataclasses.replace(config, **dict(own))


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


def _check_group(
    group: dict[str, Any], has_layouts: bool, takes_vectors: bool, settings: tuple[str, ...]
) -> None:
    for param in group["params"]:
        # A layout may see matrices in a tensor of more dimensions, such as packed experts.
        is_odd = (param.ndim < 2 and not takes_vectors) or (param.ndim > 2 and not has_layouts)
        if is_odd or param.numel() == 0:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is no matrix; give parameters that are "
                "not 2-D, and embeddings and the output layer, to torch.optim.AdamW"
            )
        if is_distributed_tensor(param):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a DTensor, whose shards no step sees whole; "
                "give whole parameters (without fully_shard), or train with Megatron-Core, whose "
                "--use-distributed-optimizer shards the optimizer by whole matrices"
            )
        if param.dtype not in _DTYPES:
            raise ValueError(
                f"a parameter of dtype {param.dtype} has no spectral step; it must be float32, float64, "
                "bfloat16 or float16: give others to another optimizer"
            )
    _check_lr(group["lr"], group["params"])
    unread = group.keys() - _GROUP_KEYS
    if unread:
        names = ", ".join(sorted(unread))
        raise ValueError(
            f"{names} in a parameter group is not read: a group may have its own "
            f"{', '.join(('lr', *settings))}; make an optimizer of its own for it"
        )
