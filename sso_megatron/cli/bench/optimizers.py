"""Makes the optimizers that ``sso-megatron bench`` compares, on equal weights and gradients."""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sso_megatron.cli.bench.models import Model, Stored, layout_of
from sso_megatron.linalg.power_iteration import power_iteration, start_basis
from sso_megatron.matrices.layout import ParameterLayout
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig
from sso_megatron.optimizers.spectra import Spectra
from sso_megatron.optimizers.spectral_clip import SpectralClip
from sso_megatron.optimizers.sso import SSO, MuonSphere

TITLES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "muon_distributed": "Muon, distributed",
    "power_iteration": "power iteration alone",
    "muon_sphere": "MuonSphere",
    "sso_tracking": "SSO, tracking",
    "sso_bisection": "SSO, bisection",
    "spectra": "Spectra",
    "spectra_clip_adamw": "SPECTRA-AdamW",
}
# Copies of every weight that an optimizer holds: the weight, and its state of that size.
COPIES = {
    "adamw": 3,
    "muon": 2,
    "muon_distributed": 2,
    "muon_sphere": 2,
    "sso_tracking": 2,
    "sso_bisection": 2,
    "spectra": 3,
    "spectra_clip_adamw": 3,
}
_LR = 5e-3
# Values that Muon sets torch's precision to; torch has no nearer one for bfloat16.
_TORCH_PRECISION = {"fp32": "highest", "tf32": "high", "bf16": "medium"}


@dataclass(frozen=True)
class Setup:
    """The settings that the optimizers are made from.

    Attributes:
        model: the model whose matrices they step on.
        is_split: whether heads, and gate and up, are matrices by themselves; else each stored parameter is
            one matrix.
        sso: Newton-Schulz steps and coefficients, which hold for Muon too, and our other settings.
        shared: our placement under tensor parallelism.
        device: where the parameters are.
        tp_group: tensor-parallel group; None for one rank.
        tp_size: number of its ranks.
        tp_rank: this rank's place in it.
    """

    model: Model
    is_split: bool
    sso: SSOConfig
    shared: SpectralConfig
    device: torch.device
    tp_group: Any = None
    tp_size: int = 1
    tp_rank: int = 0

    def layout(self, stored: Stored) -> ParameterLayout:
        """Return the layout of a parameter: the matrices that it is taken as."""
        tp = {"tp_size": self.tp_size, "tp_rank": self.tp_rank, "tp_group": self.tp_group}
        return layout_of(stored, self.model, is_split=self.is_split, **tp)


@dataclass
class Contestant:
    """An optimizer with weights of its own.

    Attributes:
        step: takes one step on the gradients as they are.
        optimizer: optimizer whose step it is; None where it is no optimizer's.
        host_tensors: returns state that is on the host on every device.
    """

    step: Callable[[], Any]
    optimizer: torch.optim.Optimizer | None = None
    host_tensors: Callable[[], Sequence[Tensor]] = field(default=list)

    @property
    def batches(self) -> list[MatrixBatch]:
        """Batches of an optimizer of ours, which report more; empty for any other."""
        return self.optimizer.batches if isinstance(self.optimizer, SpectralOptimizer) else []

    def state_bytes(self) -> int:
        """Return the bytes that the optimizer keeps from step to step, for parameters and matrices."""
        kept = [state.values() for state in self.optimizer.state.values()] if self.optimizer else []
        kept += [vars(batch.cache).values() for batch in self.batches if batch.cache is not None]
        tensors = [value for values in kept for value in values if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Gradients:
    """Weights and gradients like those of a training run, the same for every optimizer.

    A weight is noise with one strong direction. Its gradient is a fixed part (noise, eight strong
    directions, and the weight's own) and a little fresh noise each round, as a slowly moving momentum
    sees it. Each matrix is drawn whole from a seed of its own and then sharded, so ranks agree.
    """

    _WEIGHT_STD = 0.02
    # Strong directions, as multiples of the spectral norm of the noise. With this radial part bisection
    # takes the 7 to 9 trials that are published for training.
    _SPIKE, _SIGNAL, _RADIAL = 1.5, 4.0, 0.05
    _FRESH = 0.2  # fresh noise, as a multiple of the fixed noise

    def __init__(self, setup: Setup, stored: Sequence[Stored]) -> None:
        """Allocate the gradients of ``stored``."""
        self._setup, self._stored = setup, stored
        self.values = [
            torch.empty(parameter.local_shape(setup.tp_size), device=setup.device) for parameter in stored
        ]

    def weight(self, index: int) -> Tensor:
        """Return the initial weight of a parameter on this rank."""
        rows, columns = self._stored[index].shape
        generator = self._generator(index, 0)
        u, v = self._unit(rows, 1, generator), self._unit(columns, 1, generator)
        noise = self._noise(index, generator)
        spike = self._SPIKE * (math.sqrt(rows) + math.sqrt(columns))
        return self._cut(index, self._WEIGHT_STD * noise.addmm_(u, v.mT, alpha=spike))

    def fill_(self, round_number: int) -> None:
        """Write the gradients of a round into ``values``."""
        for index, (parameter, value) in enumerate(zip(self._stored, self.values, strict=True)):
            rows, columns = parameter.shape
            norm = math.sqrt(rows) + math.sqrt(columns)
            of_weight, fixed = self._generator(index, 0), self._generator(index, 1)
            u, v = self._unit(rows, 1, of_weight), self._unit(columns, 1, of_weight)
            left, right = self._unit(rows, 8, fixed), self._unit(columns, 8, fixed)
            whole = self._noise(index, fixed).addmm_(left, right.mT, alpha=self._SIGNAL * norm)
            whole.addmm_(u, v.mT, alpha=self._RADIAL * norm)
            whole.add_(self._noise(index, self._generator(index, 2 + round_number)), alpha=self._FRESH)
            value.copy_(self._cut(index, whole))

    def _generator(self, index: int, stream: int) -> torch.Generator:
        generator = torch.Generator(self._setup.device)
        return generator.manual_seed((stream << 32) + index)

    def _noise(self, index: int, generator: torch.Generator) -> Tensor:
        return torch.randn(self._stored[index].shape, generator=generator, device=self._setup.device)

    def _unit(self, size: int, count: int, generator: torch.Generator) -> Tensor:
        columns = torch.randn(size, count, generator=generator, device=self._setup.device)
        return columns / columns.norm(dim=0)

    def _cut(self, index: int, whole: Tensor) -> Tensor:
        dim = self._stored[index].partition_dim
        setup = self._setup
        return whole if dim is None else whole.chunk(setup.tp_size, dim)[setup.tp_rank].contiguous()


def make_contestants(
    names: Sequence[str], setup: Setup, stored: Sequence[Stored], gradients: Gradients
) -> dict[str, Contestant]:
    """Return the optimizers by name, each with weights of its own and the shared gradients.

    With one rank and SSO or MuonSphere among the optimizers, ``power_iteration`` is added: it only reads
    the weights and searches their top singular triplets, on the first of these optimizers.
    """
    made = {name: _make(name, setup, stored, gradients) for name in names}
    ours = [one.optimizer for one in made.values() if isinstance(one.optimizer, SSO)]
    if ours and setup.tp_size == 1:
        made["power_iteration"] = _power_iteration(ours[0], setup.sso)
    return {name: made[name] for name in TITLES if name in made}


def _make(name: str, setup: Setup, stored: Sequence[Stored], gradients: Gradients) -> Contestant:
    weights = [gradients.weight(index) for index in range(len(stored))]
    if name.startswith("muon") and name != "muon_sphere":
        mode = "distributed" if name == "muon_distributed" else "duplicated"
        return _muon(mode, setup, stored, weights, gradients)
    params = [Parameter(weight) for weight in weights]
    for param, gradient in zip(params, gradients.values, strict=True):
        param.grad = gradient
    if name == "adamw":
        adamw = torch.optim.AdamW(params, lr=_LR)
        return Contestant(adamw.step, adamw, lambda: [adamw.state[p]["step"] for p in params])
    layouts = {id(p): setup.layout(parameter) for p, parameter in zip(params, stored, strict=True)}
    placed: Any = {"shared": setup.shared, "find_layout": lambda p: layouts[id(p)]}
    ours: SpectralOptimizer
    if name == "spectra":
        ours = Spectra(params, _LR, **placed)
    elif name == "spectra_clip_adamw":
        ours = SpectralClip(params, _LR, msign_steps=max(7, setup.sso.msign_steps), **placed)
    else:
        ours = _sso(name, params, setup.sso, placed)
    return Contestant(ours.step, ours)


def _sso(name: str, params: list[Parameter], settings: SSOConfig, placed: dict[str, Any]) -> SSO:
    kind = MuonSphere if name == "muon_sphere" else SSO
    solver = {"solver": "bisection"} if name == "sso_bisection" else {"solver": "tracking"}
    return kind(params, _LR, config=SSOConfig(**(vars(settings) | solver)), **placed)


def _muon(
    mode: str, setup: Setup, stored: Sequence[Stored], weights: Sequence[Tensor], gradients: Gradients
) -> Contestant:
    """Return Megatron's Muon; each logical matrix is a parameter, its gradient a view of the shared one."""
    muon_class, collection_class = import_megatron()
    params = []
    for parameter, weight, gradient in zip(stored, weights, gradients.values, strict=True):
        for split in setup.layout(parameter).splits:
            param: Any = Parameter(split.read(weight).clone())
            param.grad = split.read(gradient)
            param.tensor_model_parallel = split.partition_dim is not None
            param.partition_dim = -1 if split.partition_dim is None else split.partition_dim
            params.append(param)
    muon = muon_class(
        params,
        lr=_LR,
        momentum=setup.sso.momentum,
        nesterov=setup.sso.nesterov,
        weight_decay=0.0,
        fp32_matmul_prec=_TORCH_PRECISION[setup.sso.msign_precision],
        coefficient_type=setup.sso.coefficient_type,
        num_ns_steps=setup.sso.msign_steps,
        pg_collection=None if setup.tp_group is None else collection_class(tp=setup.tp_group),
        tp_mode=mode,
    )
    return Contestant(muon.step, muon)


def import_megatron() -> tuple[Any, Any]:
    """Import ``TensorParallelMuon`` and ``ProcessGroupCollection``; some ten seconds the first time."""
    logging.disable(logging.WARNING)  # Megatron says what it could use in training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
            from megatron.core.process_groups_config import ProcessGroupCollection
        finally:
            logging.disable(logging.NOTSET)
    # With one rank there is no process group; every step would say so.
    warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed")
    return TensorParallelMuon, ProcessGroupCollection


def _power_iteration(optimizer: SSO, config: SSOConfig) -> Contestant:
    """Return the search for top singular triplets on the optimizer's batches, with bases of its own."""
    bases: dict[int, Tensor] = {}

    @torch.no_grad()
    def step() -> None:
        for index, batch in enumerate(optimizer.batches):
            W = torch.stack([member.split.read(member.param.detach()) for member in batch.members])
            basis = bases[index] if index in bases else start_basis(W, config.power_block)
            bases[index] = power_iteration(W, basis, degree=config.power_degree).basis

    return Contestant(step)
