"""The engine every spectral optimizer runs on: parameters in, batches of matrices out."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.matrices.layout import ParameterLayout, whole
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.schedule import ExchangedBatches, Schedule, make_schedule
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.exchange import Exchange
from sso_megatron.parallel.shards import Cut, copy_all_
from sso_megatron.updates.momentum import update_momentum_

FindLayout = Callable[[Tensor], ParameterLayout]

MatrixState = dict[str, Tensor]
"""What an algorithm keeps of one logical matrix from step to step, by name."""


class SpectralOptimizer(torch.optim.Optimizer):
    """Momentum, batching and placement; a subclass takes the step on a batch of matrices.

    Collectives of ``step``: those of one exchange for each tensor-parallel group
    (``parallel.exchange``), and of each batch that stays out of it (``parallel.placement``). Their
    number grows with the number of matrices only where these exceed the workspace. They are issued
    whether or not parameters have gradients. The ranks of a group must agree on which have one.

    After two steps with every gradient a step can be captured in a CUDA graph, but with bisection. Its
    replays take gradients, and ``lr`` if that is a tensor, from where they lay at capture, and do not call
    ``on_written``. Loading state makes other tensors: capture again. As in torch, groups that are to have
    different rates need a tensor each.

    Attributes:
        on_written: called in a step with parameters that the step is done with, as soon as it is: each
            parameter once, those without a gradient included.
    """

    on_written: Callable[[list[Tensor]], None] | None = None
    state_names: tuple[str, ...] = ("momentum_buffer",)
    """What is kept of a parameter in its own shape, in ``state_dtype``."""
    takes_vectors = False
    """Whether parameters of fewer dimensions than a matrix are taken, too, which the subclass updates."""
    counts_steps = False
    """Whether the steps taken are counted: ``step`` in each parameter group, as FusedAdam has it, a 0-d
    float32 tensor on the device, or a number until the next step."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float,
        shared: SpectralConfig,
        find_layout: FindLayout | None,
    ) -> None:
        """See the subclass; ``find_layout=None`` takes every parameter as one whole matrix."""
        self.shared = shared
        self._momentum, self._nesterov, self._weight_decay = momentum, nesterov, weight_decay
        self._find_layout = find_layout
        self._schedule: Schedule | None = None
        self._unfinished: Counter[Tensor] = Counter()
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
            if name not in ("step", "on_written") and not name.startswith("_optimizer_")
        }
        without: dict[str, Any] = {"_schedule": None, "_unfinished": Counter()}
        return own | without | {"_loaded": self.spectral_state()}

    @property
    def batches(self) -> list[MatrixBatch]:
        """Batches of logical matrices; those of cut ones in the same order on every rank of their group."""
        return self._scheduled().batches

    def _scheduled(self) -> Schedule:
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step; see the class for the collectives.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        self.begin_step()
        for param in self._parameters():
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(
                    "a spectral step needs dense gradients; give a parameter with sparse "
                    "gradients to torch.optim.SparseAdam"
                )
            self.take_gradient_(param, param.grad)
        schedule = self._scheduled()
        if self.on_written is not None:
            members = (member for batch in schedule.batches for member in batch.members)
            # Of some cut matrices this rank holds nothing, and hears nothing.
            self._unfinished = Counter(member.param for member in members if member.split.rows)
        meanwhile = iter(schedule.meanwhile)
        for unit in schedule.units:
            if isinstance(unit, MatrixBatch):
                self._step_batch(unit)
            else:
                self._step_exchanged(unit, meanwhile)
        return loss

    def _step_batch(self, batch: MatrixBatch) -> None:
        # Cut batches always take part: the other ranks of the group wait for this one.
        if batch.shards is None and all(member.param.grad is None for member in batch.members):
            self._finish(batch.members)
            return
        W, N = self._spread(batch)
        self._update(batch, W, N)
        self._write(batch.here, batch.placement.own(W))

    def _spread(self, batch: MatrixBatch) -> Tensor:
        room, (weights, directions) = batch.placement.stage(2, **batch.options)
        self._read(batch.members, weights, directions)
        return batch.placement.spread(room, 2)

    def _step_exchanged(self, unit: ExchangedBatches, meanwhile: Iterator[list[MatrixBatch]]) -> None:
        for boundary, batches in enumerate([*unit.rounds, []]):
            self._send(unit, boundary)
            for batch in next(meanwhile):
                self._step_batch(batch)
            self._receive(unit)
            for batch, places in batches:
                self._step_owned(unit.exchange, batch, places)

    def _send(self, unit: ExchangedBatches, boundary: int) -> None:
        places, weights, directions = unit.exchange.pack(boundary)
        self._read([unit.members[i] for i in places], weights, directions)
        unit.exchange.send()

    def _receive(self, unit: ExchangedBatches) -> None:
        places, results = unit.exchange.receive()
        self._write([unit.members[i] for i in places], results)

    def _step_owned(self, exchange: Exchange, batch: MatrixBatch, places: list[int]) -> None:
        """A batch of matrices whose other shards ``exchange`` has brought; ``places`` are its own."""
        W, N = (torch.empty(len(places), *batch.shape, **batch.options) for _ in range(2))
        self._read(batch.here, batch.placement.own(W), batch.placement.own(N))
        exchange.take(places, W, N)
        self._update(batch, W, N)
        exchange.give(places, W)
        self._write(batch.here, batch.placement.own(W))

    def _update(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        if self._weight_decay:
            W.mul_(1 - batch.group["lr"] * self._weight_decay)
        self.update_batch_(batch, W, N)

    def _read(self, members: list[Member], weights: list[Tensor], directions: list[Tensor]) -> None:
        """Put this rank's part of weights and momentum directions into the places given."""
        # Matrices of scattered rows are copied on the way: one at a time, for the sake of memory.
        is_scattered = any(len(member.split.rows) > 1 for member in members)
        size = 1 if is_scattered else max(1, len(members))
        for k in range(0, len(members), size):
            some = members[k : k + size]
            copy_all_(weights[k : k + size], [m.split.read(m.param.detach()) for m in some])
            self.read_directions(some, directions[k : k + size])

    def begin_step(self) -> None:
        """Count the step; once, before anything is read or written."""
        for group in self.param_groups if self.counts_steps else ():
            group["step"].add_(1)

    def take_gradient_(self, param: Tensor, gradient: Tensor) -> None:
        """Take a parameter's gradient into its state, before any batch is worked on."""
        update_momentum_(self.state[param]["momentum_buffer"], gradient, self._momentum)

    def read_directions(self, members: list[Member], places: list[Tensor]) -> None:
        """Put this rank's part of what ``update_batch_`` gets as ``N`` into the places given."""
        momenta = self.read_state(members, "momentum_buffer")
        if not self._nesterov:
            copy_all_(places, momenta)
            return
        # The look ahead, (1 - beta) G + beta M, in place.
        self.read_gradients(members, places)
        torch._foreach_lerp_(places, momenta, self._momentum)

    def read_state(self, members: list[Member], name: str) -> list[Tensor]:
        """This rank's part of each matrix of one of ``state_names``: a view where rows are contiguous."""
        return [m.split.read(self.state[m.param][name]) for m in members]

    def read_gradients(self, members: list[Member], places: list[Tensor]) -> None:
        """Put this rank's part of gradients into the places given, zeros where there is none."""
        filled, gradients = [], []
        for member, place in zip(members, places, strict=True):
            if member.param.grad is None:
                place.zero_()
            else:
                filled.append(place)
                gradients.append(member.split.read(member.param.grad))
        copy_all_(filled, gradients)

    def _write(self, members: list[Member], values: list[Tensor]) -> None:
        """Put this rank's part of updated weights into the parameters.

        A parameter without a gradient is left as it is, as every torch optimizer does.
        """
        for member, value in zip(members, values, strict=True):
            if member.param.grad is not None:
                member.split.write_(member.param.detach(), value)
        self._finish(members)

    def _finish(self, members: list[Member]) -> None:
        if self.on_written is None:
            return
        finished = []
        for member in members:
            if not member.split.rows:
                continue
            self._unfinished[member.param] -= 1
            if not self._unfinished[member.param]:
                finished.append(member.param)
        if finished:
            self.on_written(finished)

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Take the algorithm's step in place.

        Args:
            batch: gives the group's settings and holds the algorithm's cache and statistics.
            W: ``(b, p, q)`` weights of ``batch.here``, of which there may be none, float32 or float64;
                whole matrices, or rows of them where ``batch.placement.total`` sums over the others.
            N: ``(b, p, q)`` what ``read_directions`` gave, here the momentum, same dtype.
        """
        raise NotImplementedError

    def matrix_states(self, batch: MatrixBatch) -> list[MatrixState]:
        """What is kept of each of ``batch.here``: tensors of their own, on the host."""
        raise NotImplementedError

    def fits(self, batch: MatrixBatch, state: MatrixState) -> bool:
        """Whether ``matrix_states`` of another layout or setting can be gone on with in this one."""
        raise NotImplementedError

    def polar_work(self) -> PolarWork:
        """What a step on one matrix does, for the cost model that chooses placements."""
        raise NotImplementedError

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that ``update_batch_`` takes for one whole matrix, with its W and N."""
        raise NotImplementedError

    def cut_workspace(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """The same for a matrix of which this rank holds ``rows``, and others the rest."""
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
