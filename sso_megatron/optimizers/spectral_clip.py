"""AdamW, Signum and AdEMAMix with spectrally clipped updates, as a torch optimizer (arXiv 2603.14315)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.spectral_clip import spectral_clip
from sso_megatron.matrices.layout import ParameterLayout
from sso_megatron.matrices.scaling import update_scale
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.config import SpectralClipConfig
from sso_megatron.parallel.shards import Cut, norms_of
from sso_megatron.updates.bases import AdamW, AdEMAMix, Base, Numbers, Signum, States
from sso_megatron.updates.spectral_clip import ClipSchedule, clip_vectors_, clipped_step_


@dataclass(frozen=True)
class _Step:
    """The numbers of a step on one parameter group.

    Attributes:
        base: the base optimizer with the group's settings.
        numbers: the base's numbers, such as its bias corrections.
        c: threshold of the clipping.
    """

    base: Base
    numbers: Numbers
    c: Tensor | float


class SpectralClip(SpectralOptimizer):
    """SPECTRA: another optimizer's update with its singular values clipped softly at ``c``.

    ``W <- (1 - lr wd) W - lr alpha H_c(U)``, where ``U`` is the direction of AdamW, Signum or AdEMAMix and
    ``alpha = sqrt(max(1, d_out / d_in))``, for every 2-D parameter, or every logical matrix of it where
    ``find_layout`` names them. Parameters of fewer dimensions are taken as vectors, which may be cut: they
    have no weight decay, and with ``apply_to="all"`` their update is clipped by its Euclidean norm.

    State, in float32 (float64 for float64 parameters), is the base's: ``exp_avg`` and ``exp_avg_sq``;
    ``momentum_buffer``; or ``exp_avg_fast``, ``exp_avg_slow`` and ``exp_avg_sq``. Bias corrections, warmups
    and the schedule of ``c`` go by the number of steps taken, which the parameter groups keep.

    Collectives: see ``SpectralOptimizer``, and for each parameter group one all-reduce of the norms of the
    vectors that are cut. No step waits for the device.

    Example:
        >>> optimizer = SpectralClip(model.parameters(), lr=1e-3, base="signum")
    """

    config_cls = SpectralClipConfig
    config: SpectralClipConfig
    works_on_shards = True
    takes_vectors = True
    counts_steps = True
    own_columns = ("clipped_share",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        config: SpectralClipConfig | None = None,
        **options: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: parameters of at most two dimensions, or groups of them, which may have their own
                ``max_lr``, too; see ``SpectralOptimizer``.
            lr: learning rate; with ``c_warmup_steps`` and without ``lr_peak`` the one that the warmup ends
                at, which is what torch's schedulers take it for. The paper trains with 1e-3.
            config: settings as one object, instead of by name.
            options: ``shared``, ``find_layout`` and fields of ``SpectralClipConfig``; see
                ``SpectralOptimizer``. ``find_layout`` gives a vector's layout as one column.

        Raises:
            ValueError: a setting outside its rule, a parameter of more dimensions, or a warmup of ``c``
                to a learning rate that is not known.
        """
        self._peaks: list[float] = []
        self._steps: dict[Tensor, _Step] = {}
        super().__init__(params, lr, config=config, **options)
        c = self.config
        self.state_names = _base(c).state_names
        self._coefficients = polar_coefficients("polar_express", c.msign_steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group and note its learning rate's peak, which no checkpoint has."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        peak = float(self.config.lr_peak or group.get("max_lr") or group["lr"])
        if self.config.c_warmup_steps and not peak > 0:
            self._drop_last_group()
            raise ValueError(
                f"lr={peak!r} is not what a warmup of c_warmup_steps={self.config.c_warmup_steps} ends at; "
                "give lr_peak, or make the group with that learning rate"
            )
        self._peaks.append(peak)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of parameters, groups and the count of steps.

        Raises:
            ValueError: the state is that of another base.
        """
        for kept in state_dict["state"].values():
            if kept and not set(self.state_names) <= kept.keys():
                raise ValueError(
                    f"base={self.config.base!r} keeps {', '.join(self.state_names)}, and the state to load "
                    f"has {', '.join(map(str, kept))}; load the state of the same base"
                )
        super().load_state_dict(state_dict)

    def _layout(self, group: dict[str, Any], position: int) -> ParameterLayout:
        is_vector = group["params"][position].ndim < 2
        return ParameterLayout("", ()) if is_vector else super()._layout(group, position)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one optimizer step; the class lists its collectives.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = super().step(closure)
        for group in self.param_groups:
            self._step_vectors(group)
        self._steps.clear()
        return loss

    def begin_step(self) -> None:
        """Count the step, and compute the numbers of each group's step."""
        super().begin_step()
        for group in self.param_groups:
            count = group["step"].double()
            config = self.config_of(group)
            base, schedule = _base(config), _schedule(config)
            step = _Step(base, base.numbers(count), schedule.at(count, group["lr"], self._peak(group)))
            self._steps.update(dict.fromkeys(group["params"], step))

    def take_gradient_(self, param: Tensor, gradient: Tensor) -> None:
        """Update the base's state with a parameter's gradient."""
        gradient = gradient.to(self.state_dtype(param))
        step = self._steps[param]
        step.base.update_(self._states([param]), [gradient], step.numbers)

    def _peak(self, group: dict[str, Any]) -> float:
        return next(p for g, p in zip(self.param_groups, self._peaks, strict=True) if g is group)

    def _states(self, params: list[Tensor]) -> States:
        return {name: [self.state[param][name] for param in params] for name in self.state_names}

    def read_directions(self, members: list[Member], places: list[Tensor]) -> None:
        """Copy this rank's part of the base's directions into the places given."""
        # An exchange brings matrices of several parameter groups at once.
        for step in {id(step): step for step in (self._steps[m.param] for m in members)}.values():
            mine = [i for i, member in enumerate(members) if self._steps[member.param] is step]
            some, U = [members[i] for i in mine], [places[i] for i in mine]
            if step.base.looks_ahead:
                self.read_gradients(some, U)
            states = {name: self.read_state(some, name) for name in self.state_names}
            step.base.direction_(U, states, step.numbers)

    def _cut(self, vector: Tensor) -> tuple[str, Any]:
        """Return the name of a vector, and the group that it is cut over or None."""
        if self._find_layout is None:
            return "", None
        layout = self._find_layout(vector)
        is_cut = any(split.partition_dim is not None for split in layout.splits)
        return layout.name, layout.tp_group if is_cut else None

    def _step_vectors(self, group: dict[str, Any]) -> None:
        vectors = [param for param in group["params"] if param.ndim < 2]
        # Ranks may list those that are cut in other orders.
        vectors.sort(key=lambda vector: self._cut(vector)[0])
        for dtype in dict.fromkeys(param.dtype for param in vectors):
            params = [param for param in vectors if param.dtype == dtype and param.grad is not None]
            if not params:
                continue
            step = self._steps[params[0]]
            U = [
                param.grad.to(self.state_dtype(param), copy=True)
                for param in params
                if param.grad is not None
            ]
            step.base.direction_(U, self._states(params), step.numbers)
            if self.config.apply_to == "all":
                norms = norms_of(U, [self._cut(param)[1] for param in params])
                clip_vectors_(U, norms, step.c, is_continuous=self.config.one_dimensional == "continuous")
            torch._foreach_mul_(U, group["lr"])
            torch._foreach_sub_(params, U)
        if vectors and self.on_written is not None:
            self.on_written(vectors)

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Clip the direction and step, in place; see ``updates.spectral_clip.clipped_step_``."""
        batch.stats = clipped_step_(
            W,
            N,
            c=self._steps[batch.members[0].param].c,
            scale=update_scale(batch.shape, "spectral_kaiming", 1.0),
            lr=batch.group["lr"],
            coefficients=self._coefficients,
            all_reduce=batch.placement.all_reduce,
            measures=self.measures is not None,
        )

    def measured(self, batch: MatrixBatch) -> dict[str, Tensor]:
        """Return ``clipped_share``, the part of ``||U||_F^2`` that clipping removed."""
        return {"clipped_share": batch.stats}

    @torch.no_grad()
    def pre_clip_(self) -> None:
        """Clip the gradients of all matrices at ``pre_clip_c`` in place, unless ``pre_clip_c`` is 0.

        To be called after the backward pass, before the global norm is taken. During the warmup the
        threshold is raised as ``c`` is, as in the published code. Every rank of a tensor-parallel group
        must call it.

        Collectives: for each batch that is cut one all-gather, or one all-reduce where the placement is
        ``distributed``.
        """
        if not self.config.pre_clip_c:
            return
        self.init_state()
        schedule = ClipSchedule(self.config.pre_clip_c, self.config.c_warmup_steps)
        for batch in self.batches:
            if batch.shards is None and all(member.param.grad is None for member in batch.members):
                continue
            G, placement = batch.gather(self.read_gradients)
            c = schedule.at(batch.group["step"].double() + 1, batch.group["lr"], self._peak(batch.group))
            clipped = placement.local_shards(spectral_clip(G, c, self._coefficients, placement.all_reduce))
            for member, value in zip(batch.members, clipped, strict=True):
                if member.param.grad is not None:
                    member.split.write_(member.param.grad, value)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Count weight, direction and two iterates, and squares of the short side."""
        return (4 * shape[0] * shape[1] + 6 * min(shape) ** 2) * dtype.itemsize

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Count shards of weight and direction, and in float64 two more and squares of the whole side."""
        rows, columns = max(cut.lengths), cut.shape[1 - cut.dim]
        in_double = 2 * rows * columns + 6 * columns**2
        return 2 * rows * columns * dtype.itemsize + in_double * torch.float64.itemsize


def _schedule(config: SpectralClipConfig) -> ClipSchedule:
    c = config
    return ClipSchedule(
        c.c, c.c_warmup_steps, c.c_decay, c.c_decay_steps, c.c_final, num_steps=c.train_steps
    )


def _base(config: SpectralClipConfig) -> Base:
    c = config
    if c.base == "adamw":
        return AdamW(c.beta1, c.beta2, c.eps)
    if c.base == "signum":
        return Signum(c.momentum, c.nesterov)
    warmup_steps = c.ademamix_warmup_steps or c.train_steps
    return AdEMAMix(c.beta1, c.ademamix_beta2, c.ademamix_beta3, c.ademamix_alpha, warmup_steps, c.eps)
