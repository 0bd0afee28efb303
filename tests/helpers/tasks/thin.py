"""Steps on matrices cut over real process groups, without an optimizer; told what to do by one argument."""

import json
import sys
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from helpers.probes import Collectives, save
from helpers.tasks.parallel import whole_of
from sso_megatron import SpectralClip
from sso_megatron.linalg.block_iteration import find_block
from sso_megatron.linalg.orthonormal import orthonormalize
from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.matrices.layout import ParameterLayout, whole
from sso_megatron.updates.spectra import SpectraCache, SpectraRule, spectra_step_
from sso_megatron.updates.spectral_adam import SpectralAdamCache, SpectralAdamRule, spectral_adam_step_

SPECTRA = SpectraRule(num_iterations=1, update_rms=0.2, eps=1e-8)
SPECTRAL_ADAM = SpectralAdamRule(high=1.5, low=0.67, period=3, beta1=0.9, beta2=0.95, eps=1e-8)


def all_reduce(part: torch.Tensor) -> torch.Tensor:
    part = part.contiguous()
    dist.all_reduce(part)
    return part


def drawn(m: int, n: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and gradients of two matrices: three fixed strong directions and fresh noise."""
    gen = torch.Generator().manual_seed(m + n)
    spike = torch.randn(2, m, 3, generator=gen) @ torch.randn(2, 3, n, generator=gen)
    return torch.randn(2, m, n, generator=gen), spike + torch.randn(steps, 2, m, n, generator=gen)


def vectors() -> None:
    """Saves the parts of two vectors that ranks hold and list in other orders."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    gen = torch.Generator().manual_seed(0)
    pairs = {name: torch.randn(2, 8, generator=gen) for name in ("a", "b")}
    pairs["b"][1, 2:] = 0  # fewer signs, another norm
    parts = {name: pair.chunk(size, dim=1)[rank] for name, pair in pairs.items()}
    params = {name: torch.nn.Parameter(pair[0].clone()) for name, pair in parts.items()}
    layouts = {}
    for name, param in params.items():
        param.grad = parts[name][1].clone()
        split = whole((param.numel(), 1), 0, size)
        layouts[param] = ParameterLayout(name, (split,), dist.group.WORLD)
    listed = list(params.values())
    optimizer = SpectralClip(
        listed[::-1] if rank else listed,
        lr=1.0,
        c=0.5,
        base="signum",
        one_dimensional="continuous",
        find_layout=layouts.__getitem__ if size > 1 else None,
    )
    optimizer.step()
    save("vectors", {name: param.detach() for name, param in params.items()})


def train() -> None:
    """Saves whole weights and what is kept of each matrix, and the collectives of every step.

    The argument: ``matrices`` (name to ``[m, n, dim, length by rank]``), ``steps``, ``kind``.
    """
    task = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    finals, kept, counted = {}, {}, {}
    for name, (m, n, dim, lengths) in task["matrices"].items():
        W, gradients = drawn(m, n, task["steps"])
        view = ShardView((m, n))
        if size > 1:
            first = [0, *accumulate(lengths)][rank]
            W = W.narrow(dim + 1, first, lengths[rank]).clone()
            gradients = gradients.narrow(dim + 2, first, lengths[rank])
            view = ShardView((m, n), all_reduce, first if dim else None)
        run = spectra if task["kind"] == "spectra" else spectral_adam
        with Collectives() as seen:
            kept[name] = run(W, gradients, view, seen)
        finals[name] = W if size == 1 else torch.cat(whole_of(W), dim + 1)
        counted[name] = seen.steps
    save("final", finals)
    save("kept", kept)
    save("collectives", counted)
    dist.destroy_process_group()


def spectra(W: torch.Tensor, gradients: torch.Tensor, view: ShardView, seen: Collectives) -> torch.Tensor:
    seen.next_step()
    cache = SpectraCache(find_block(gradients[0], 3, view))
    M = torch.zeros_like(W)
    for G in gradients:
        seen.next_step()
        M = 0.95 * M + G
        spectra_step_(W, M.clone(), cache, lr=0.05, rule=SPECTRA, view=view)
    return cache.V


def spectral_adam(
    W: torch.Tensor, gradients: torch.Tensor, view: ShardView, seen: Collectives
) -> torch.Tensor:
    seen.next_step()
    cache = SpectralAdamCache(find_block(gradients[0], 1, view), torch.zeros(2, dtype=torch.float64))
    averages = torch.zeros((2, *W.shape))
    for number, G in enumerate(gradients):
        seen.next_step()
        G = G * (3.0 if number == 4 else 1.0)
        step = torch.tensor(number + 1.0)
        args: Any = (W, G, *averages, step, cache)
        spectral_adam_step_(*args, lr=0.01, rule=SPECTRAL_ADAM, view=view)
    return torch.cat([cache.v, cache.norm[:, None, None].float()], dim=1)


def orthonormal() -> None:
    """Saves the basis of a block whose rows are cut; the argument: rows by rank."""
    dist.init_process_group("gloo")
    lengths = json.loads(sys.argv[1])
    gen = torch.Generator().manual_seed(0)
    P = torch.randn(3, sum(lengths), 6, generator=gen) * torch.logspace(-20, 20, 6)
    P[1, :, 2] = P[1, :, 1] * 2.0
    P[2] = 0
    shards = P.split(lengths, dim=1)
    save("basis", orthonormalize(shards[dist.get_rank()].contiguous(), all_reduce))
    save("whole", orthonormalize(P))
    dist.destroy_process_group()
