"""The base class of the spectral optimizers: weights go to the ranks that update them, and back."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.matrix_optimizer import FindLayout, MatrixOptimizer
from sso_megatron.optimizers.measures import StepMeasures, spectral_norms
from sso_megatron.optimizers.schedule import ExchangedBatches
from sso_megatron.optimizers.settings import one_config
from sso_megatron.parallel.exchange import Exchange
from sso_megatron.parallel.shards import copy_all_
from sso_megatron.updates.momentum import update_momentum_


class SpectralOptimizer(MatrixOptimizer):
    """Takes care of momentum, batching and placement; a subclass updates a batch of matrices.

    A subclass needs ``config_cls`` and ``update_batch_``. Of the configuration's fields ``momentum``,
    ``nesterov`` and ``weight_decay`` are read here, where they exist: the gradient's moving average,
    whether to look ahead by one gradient, and decoupled weight decay. A subclass with another momentum
    overrides ``take_gradient_`` and ``read_directions``.

    Collectives of ``step``: those of one exchange for each tensor-parallel group
    (``parallel.exchange``), and of each batch that stays out of it (``parallel.placement``). Their
    number grows with the number of matrices only where these exceed the workspace. They are issued
    whether or not parameters have gradients. The ranks of a group must agree on which have one.

    After two steps with every gradient a step can be captured in a CUDA graph, but with bisection. Its
    replays take gradients, and ``lr`` if that is a tensor, from where they lay at capture, and do not call
    ``on_written``. Loading state makes other tensors: capture again. As in torch, groups that are to have
    different rates need a tensor each.

    Attributes:
        config_cls: dataclass of the settings.
        config: the settings.
        on_written: called during a step with the parameters that the step has finished: each parameter
            once, parameters without a gradient included.
        measures: collects what the next steps do to each matrix; None, as it is at first, costs nothing.
        own_columns: names of the columns that ``measured`` returns, apart from ``spectral_norm``.
        finds_norms: whether ``measured`` returns ``spectral_norm``, too, because the step finds it anyway.
    """

    config_cls: type[Any]
    on_written: Callable[[list[Tensor]], None] | None = None
    measures: StepMeasures | None = None
    own_columns: tuple[str, ...] = ()
    finds_norms = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        config: Any = None,
        shared: SpectralConfig | None = None,
        find_layout: FindLayout | None = None,
        **settings: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: 2-D parameters, or groups of them; a group may have its own ``lr``, and its own value of
                settings that are declared ``by_group``.
            lr: learning rate. A 0-d tensor on the parameters' device can be changed between replays of a
                CUDA graph.
            config: settings as one ``config_cls``, instead of ``settings``.
            shared: settings that all spectral optimizers share.
            find_layout: gives a parameter's ``ParameterLayout``; without it every parameter is one whole
                matrix.
            settings: fields of ``config_cls`` by name.

        Raises:
            ValueError: a setting outside its rule, or a parameter that is no matrix.
            TypeError: a setting that does not exist, or ``config`` and ``settings`` together.
        """
        c = one_config(self.config_cls, config, settings)
        self._configs: dict[Tensor, Any] = {}
        self._unfinished: Counter[Tensor] = Counter()
        shared = shared or SpectralConfig()
        super().__init__(params, lr=lr, config=c, shared=shared, find_layout=find_layout)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copy and pickle take, without ``on_written`` and ``measures``."""
        own = super().__getstate__() | {"_unfinished": Counter(), "_configs": {}}
        return {name: value for name, value in own.items() if name not in ("on_written", "measures")}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one optimizer step; the class lists its collectives.

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
        schedule = self.schedule
        if self.on_written is not None:
            members = (member for batch in schedule.batches for member in batch.members)
            # This rank may hold no row of a cut matrix, and then no result of it comes here.
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
        W, N = self._gathered(batch)
        self._update(batch, W, N)
        self._write(batch.here, batch.placement.local_shards(W))

    def _gathered(self, batch: MatrixBatch) -> Tensor:
        buffer, (weights, directions) = batch.placement.allocate(2, **batch.options)
        self._read(batch.members, weights, directions)
        return batch.placement.gather(buffer, 2)

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
        """Step on matrices that this rank owns and whose other shards ``exchange`` has brought.

        Args:
            exchange: it holds the other shards, and takes the results.
            batch: the matrices, those of other owners included.
            places: places of ``batch.here`` in the exchange's plan.
        """
        W, N = (torch.empty(len(places), *batch.shape, **batch.options) for _ in range(2))
        self._read(batch.here, batch.placement.local_shards(W), batch.placement.local_shards(N))
        exchange.take(places, W, N)
        self._update(batch, W, N)
        exchange.give(places, W)
        self._write(batch.here, batch.placement.local_shards(W))

    def _update(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        known = {}
        if self.measures is not None and not self.finds_norms:
            known["spectral_norm"] = spectral_norms(batch, W)
        weight_decay = getattr(self.config_of(batch.group), "weight_decay", 0.0)
        if weight_decay:
            W.mul_(1 - batch.group["lr"] * weight_decay)
        self.update_batch_(batch, W, N)
        if self.measures is not None:
            known |= self.measured(batch)
            self.measures.add_worked(batch, [known[name] for name in self.columns])

    def _read(self, members: list[Member], weights: list[Tensor], directions: list[Tensor]) -> None:
        """Copy this rank's part of weights and momentum directions into the places given."""
        # Matrices of scattered rows are copied on the way: one at a time, for the sake of memory.
        is_scattered = any(len(member.split.rows) > 1 for member in members)
        size = 1 if is_scattered else max(1, len(members))
        for k in range(0, len(members), size):
            some = members[k : k + size]
            copy_all_(weights[k : k + size], [m.split.read(m.param.detach()) for m in some])
            self.read_directions(some, directions[k : k + size])

    def begin_step(self) -> None:
        """Count the step. It is called once a step, before anything is read or written."""
        self._configs.clear()
        for group in self.param_groups:
            self._configs.update(dict.fromkeys(group["params"], self.config_of(group)))
            if self.counts_steps:
                group["step"].add_(1)

    def take_gradient_(self, param: Tensor, gradient: Tensor) -> None:
        """Update a parameter's state with its gradient. It is called before any batch is worked on."""
        momentum = getattr(self._configs[param], "momentum", 0.0)
        update_momentum_(self.state[param]["momentum_buffer"], gradient, momentum)

    def read_directions(self, members: list[Member], places: list[Tensor]) -> None:
        """Copy this rank's part of what ``update_batch_`` gets as ``N`` into the places given."""
        for config, some, N in self.by_config(members, places):
            momenta = self.read_state(some, "momentum_buffer")
            if not getattr(config, "nesterov", False):
                copy_all_(N, momenta)
                continue
            # The look ahead, (1 - beta) G + beta M, in place.
            self.read_gradients(some, N)
            torch._foreach_lerp_(N, momenta, config.momentum)

    def by_config(
        self, members: list[Member], places: list[Tensor]
    ) -> Iterator[tuple[Any, list[Member], list[Tensor]]]:
        """Yield the settings in a step's groups, each with the members that have them and their places.

        An exchange brings matrices of several parameter groups at once.
        """
        chosen = [self._configs[member.param] for member in members]
        for config in {id(config): config for config in chosen}.values():
            mine = [i for i, other in enumerate(chosen) if other is config]
            yield config, [members[i] for i in mine], [places[i] for i in mine]

    def read_state(self, members: list[Member], name: str) -> list[Tensor]:
        """Return this rank's part of each matrix in one of ``state_names``: views of contiguous rows."""
        return [m.split.read(self.state[m.param][name]) for m in members]

    def read_gradients(self, members: list[Member], places: list[Tensor]) -> None:
        """Copy this rank's part of gradients into the places given, zeros where there is no gradient."""
        filled, gradients = [], []
        for member, place in zip(members, places, strict=True):
            if member.param.grad is None:
                place.zero_()
            else:
                filled.append(place)
                gradients.append(member.split.read(member.param.grad))
        copy_all_(filled, gradients)

    def _write(self, members: list[Member], values: list[Tensor]) -> None:
        """Copy this rank's part of updated weights into the parameters.

        A parameter without a gradient is left as it is, as every torch optimizer does.
        """
        changed = [(m, v) for m, v in zip(members, values, strict=True) if m.param.grad is not None]
        if self.measures is not None:
            self.measures.add_parts([member for member, _ in changed], [value for _, value in changed])
        for member, value in changed:
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
                whole matrices, or rows of them where ``batch.placement.all_reduce`` sums over the others.
            N: ``(b, p, q)`` what ``read_directions`` copied, by default the momentum, same dtype.
        """
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers that ``measures`` gets for every matrix."""
        return ("spectral_norm", *self.own_columns)

    def measured(self, batch: MatrixBatch) -> dict[str, Tensor]:
        """Return ``own_columns`` of the step just taken, each with an entry for each of ``batch.here``."""
        return {}
