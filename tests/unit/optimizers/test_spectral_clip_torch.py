"""SPECTRA as a torch optimizer: its bases, the schedule of c, vectors, resuming."""

import math
import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.megatron_runs import Megatron
from helpers.numerics.host_reads import NoHostReads
from helpers.numerics.problems import low_rank_problem, noise_problem, start
from sso_megatron.cli.bench.meters import HostSyncs
from sso_megatron.matrices.layout import ParameterLayout, gate_up_splits
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.optimizers.spectral_clip import SpectralClip
from sso_megatron.updates.spectral_clip import ClipSchedule

BASES = ["adamw", "signum", "ademamix"]
HUGE = 1e9
"""A c that clips nothing."""


def of(base: str, **settings: Any) -> dict[str, Any]:
    return {"base": base, "train_steps": 50} | settings


@pytest.mark.parametrize("problem", [noise_problem, low_rank_problem])
@pytest.mark.parametrize("shape", [(48, 64), (80, 32), (48, 48)])
@pytest.mark.parametrize(
    ("base", "ours", "theirs"),
    [
        *((base, {}, {}) for base in BASES),
        ("signum", {"nesterov": False}, {"nesterov": False}),
        ("ademamix", {"ademamix_warmup_steps": 20}, {"warmup": 20}),
    ],
)
def test_fifty_steps_follow_the_oracle(problem, shape, base, ours, theirs) -> None:
    gradient, lr, c = problem(shape, 0), 5e-3, 4.0
    exact = oracle.ClippedOptimizer(start(shape, 0), base, **theirs)
    param = torch.nn.Parameter(torch.from_numpy(exact.W).float())
    optimizer = SpectralClip([param], lr=lr, c=c, **of(base, **ours))
    for _ in range(50):
        G = gradient(exact.W)
        param.grad = torch.from_numpy(G).float()
        optimizer.step()
        exact.step(G, lr, c)
    error = np.linalg.norm(param.detach().double().numpy() - exact.W) / np.linalg.norm(exact.W)
    assert error < 1e-3


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, steps: range, lrs: Any = None) -> None:
    """Gradients depend on the step and the parameter's place alone."""
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            if lrs is not None:
                group["lr"] = lrs(step)
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=gen).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_where_nothing_is_clipped(dtype: torch.dtype) -> None:
    """torch's own AdamW, whose vectors have no weight decay."""
    shapes = [(20, 30), (30, 30), (7,), ()]
    ours, theirs = params_of(*shapes, dtype=dtype), params_of(*shapes, dtype=dtype)
    optimizer = SpectralClip(ours, lr=0.02, c=HUGE, beta2=0.99)
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.99))
    for one in (optimizer, reference):
        train(one, range(20))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tall_matrices_step_further() -> None:
    """By sqrt(d_out / d_in), of the logical matrix."""
    W = torch.zeros(80, 20)
    param = torch.nn.Parameter(W.clone())
    layout = ParameterLayout("fc1", gate_up_splits((80, 20), None, 1))
    optimizer = SpectralClip([param], lr=0.1, base="signum", c=HUGE, find_layout=lambda p: layout)
    train(optimizer, range(1))
    torch.testing.assert_close(
        param.detach().abs(), torch.full_like(W, 0.1 * math.sqrt(2)), rtol=1e-4, atol=0
    )


def test_updates_are_bounded() -> None:
    param, c, lr = torch.nn.Parameter(torch.zeros(64, 96)), 3.0, 0.1
    optimizer = SpectralClip([param], lr=lr, c=c, base="signum", momentum=0.0)
    param.grad = torch.ones_like(param) + 1e-3 * torch.randn(64, 96)
    optimizer.step()
    norm = torch.linalg.matrix_norm(param.detach().double(), ord=2).item() / lr
    assert 0.999 * c < norm <= c * (1 + 1e-6)  # lr in float32


# ---------------------------------------------------------------- the schedule of c

PEAK = 4e-3


def at(schedule: ClipSchedule, step: int, lr: float | torch.Tensor = PEAK) -> float:
    return float(schedule.at(torch.tensor(float(step), dtype=torch.float64), lr, PEAK))


def test_c_times_lr_is_constant_during_warmup() -> None:
    schedule = ClipSchedule(10.0, warmup_steps=5)
    for step in range(1, 6):
        lr = PEAK * (step - 1) / 5
        if lr:
            assert at(schedule, step, lr) * lr == pytest.approx(10.0 * PEAK)
            assert at(schedule, step, torch.tensor(lr)) * lr == pytest.approx(10.0 * PEAK)
        else:
            assert 10.0 < at(schedule, step, lr) < math.inf
    assert [at(schedule, step, 0.5 * PEAK) for step in (6, 7, 1000)] == [10.0] * 3
    assert ClipSchedule(10.0).at(torch.tensor(1.0), PEAK, PEAK) == 10.0


@pytest.mark.parametrize(
    ("decay", "half"),
    [
        ("linear", 0.5),
        ("sqrt", 1 - math.sqrt(0.5)),
        ("cosine", 0.5),
        ("square", 0.75),
        ("exp", math.sqrt(0.1)),
    ],
)
def test_c_decays_over_the_last_steps(decay: str, half: float) -> None:
    final = 0.1 if decay == "exp" else 0.0
    schedule = ClipSchedule(10.0, 2, decay, decay_steps=8, final=final, num_steps=20)
    assert at(schedule, 13) == 10.0, "none of the decay is over"
    assert at(schedule, 17) == pytest.approx(10.0 * half)
    assert 0 < at(schedule, 21) <= at(schedule, 20) < at(schedule, 14) < 10.0
    assert at(schedule, 100) == at(schedule, 21) == pytest.approx(10.0 * final, abs=1e-4)


def warmup(step: int) -> float:
    return PEAK * min(1.0, step / 4)


def norms_of_updates(optimizer: SpectralClip, steps: range, lrs: Any) -> list[float]:
    """``||H||`` of the first parameter's steps, which have no weight decay."""
    (param, *_), norms = optimizer.param_groups[0]["params"], []
    for step in steps:
        before = param.detach().clone()
        train(optimizer, range(step, step + 1), lrs)
        change = torch.linalg.matrix_norm((param.detach() - before).double(), ord=2).item()
        norms.append(change / max(float(optimizer.param_groups[0]["lr"]), 1e-30))
    return norms


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_optimizer_follows_the_schedule(as_tensor: bool) -> None:
    """From the learning rate that it is made with, whose schedule starts at 0; signs of 64x96 exceed c."""

    def lrs(step: int) -> Any:
        return torch.tensor(warmup(step)) if as_tensor else warmup(step)

    settings = {"base": "signum", "momentum": 0.0, "weight_decay": 0.0, "c": 1.0, "train_steps": 12}
    settings |= {"c_warmup_steps": 4, "c_decay": "linear", "c_decay_steps": 4}
    optimizer = SpectralClip([torch.nn.Parameter(torch.zeros(64, 96))], lr=PEAK, **settings)
    norms = norms_of_updates(optimizer, range(12), lrs)
    expected = [0.0, 4.0, 2.0, 4 / 3, *[1.0] * 5, 0.75, 0.5, 0.25]
    values = [c / math.sqrt(1 + (c / 18) ** 2) for c in expected]  # the largest singular value is about 18
    np.testing.assert_allclose(norms, values, rtol=2e-2)


def test_where_the_peak_is_found() -> None:
    settings = {"base": "signum", "momentum": 0.0, "weight_decay": 0.0, "c": 1.0, "c_warmup_steps": 9}
    groups = [{"lr": PEAK / 2, "max_lr": PEAK}, {"lr": PEAK}]
    for group in groups:
        param = torch.nn.Parameter(torch.zeros(64, 96))
        optimizer = SpectralClip([group | {"params": [param]}], **settings)
        assert norms_of_updates(optimizer, range(1), lambda _: PEAK / 2) == pytest.approx([2.0], rel=2e-2)
    optimizer = SpectralClip([torch.nn.Parameter(torch.zeros(64, 96))], lr=0.0, lr_peak=PEAK, **settings)
    assert norms_of_updates(optimizer, range(1), lambda _: PEAK / 2) == pytest.approx([2.0], rel=2e-2)
    with pytest.raises(
        ValueError, match=r"lr=0.0 is not what a warmup of c_warmup_steps=9 ends at; give lr_peak"
    ):
        SpectralClip([param], lr=0.0, **settings)


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("norm", [1.0, 2.99, 3.01, 50.0])
@pytest.mark.parametrize("rule", ["published", "continuous"])
def test_vectors_are_clipped_by_their_norm(rule: str, norm: float) -> None:
    c, size = 3.0, 10_000
    param = torch.nn.Parameter(torch.zeros(size))
    # With averages of one gradient g the direction is g / (|g| + eps): here v, of which no entry exceeds 1.
    optimizer = SpectralClip([param], lr=1.0, c=c, beta1=0.0, beta2=0.0, eps=1e6, one_dimensional=rule)
    v = torch.randn(size, generator=torch.Generator().manual_seed(0)).sign() * (norm / math.sqrt(size))
    param.grad = 1e6 * v / (1 - v.abs())
    optimizer.step()
    factor = 1.0 if rule == "published" and norm <= c else 1 / math.sqrt(1 + (norm / c) ** 2)
    torch.testing.assert_close(param.detach(), -factor * v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["published", "continuous"])
def test_long_vectors(rule: str) -> None:
    """Signs of 400 entries have norm 20; the continuous rule is H_c of a matrix of one column."""
    for shape in ((400,), (400, 1)):
        param = torch.nn.Parameter(torch.zeros(shape))
        optimizer = SpectralClip([param], lr=1.0, c=5.0, base="signum", one_dimensional=rule)
        param.grad = torch.ones(shape)
        optimizer.step()
        scale = 20.0 if shape == (400, 1) else 1.0  # alpha
        assert param.detach().norm().item() == pytest.approx(scale * 20 / math.sqrt(17), rel=1e-4)


def test_apply_to_matrices_alone() -> None:
    """Vectors then take the base's own step."""
    (param,) = params_of((400,))
    before = param.detach().clone()
    optimizer = SpectralClip([param], lr=1.0, c=5.0, base="signum", apply_to="2d")
    param.grad = torch.ones(400)
    optimizer.step()
    torch.testing.assert_close(param.detach(), before - 1)


# ---------------------------------------------------------------- clipping of gradients


def test_gradients_are_clipped_before() -> None:
    matrix, vector, idle = params_of((20, 30), (50,), (20, 30))
    optimizer = SpectralClip([matrix, vector, idle], lr=PEAK, pre_clip_c=0.1, c_warmup_steps=2)
    matrix.grad, vector.grad = torch.randn(20, 30), torch.randn(50)
    gradients = matrix.grad.clone(), vector.grad.clone()
    optimizer.param_groups[0]["lr"] = PEAK / 2
    optimizer.pre_clip_()
    exact = oracle.clipped(gradients[0].double().numpy(), 0.2)  # raised as c is
    np.testing.assert_allclose(matrix.grad.double().numpy(), exact, atol=1e-5)
    assert torch.equal(vector.grad, gradients[1])
    assert idle.grad is None
    assert optimizer.param_groups[0]["step"] == 0
    untouched = SpectralClip([matrix], lr=PEAK)
    matrix.grad = gradients[0].clone()
    untouched.pre_clip_()
    assert torch.equal(matrix.grad, gradients[0])


# ---------------------------------------------------------------- state


def everything(base: str) -> dict[str, Any]:
    return of(base, train_steps=8, c=2.0, c_warmup_steps=3, c_decay="cosine", c_decay_steps=3)


SHAPES = [(16, 24), (16, 24), (24, 8), (10,), ()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_resuming_is_exact(base: str, dtype: torch.dtype) -> None:
    """To the last bit, also into an optimizer that went another way, with its own learning rate."""

    def lrs(step: int) -> float:
        return 1e-2 * min(1.0, (step + 1) / 3)

    straight, stopped = params_of(*SHAPES, dtype=dtype), params_of(*SHAPES, dtype=dtype)
    train(SpectralClip(straight, lr=1e-2, **everything(base)), range(8), lrs)
    first = SpectralClip(stopped, lr=1e-2, **everything(base))
    train(first, range(2), lrs)
    weights, state = [p.detach().clone() for p in stopped], deepcopy(first.state_dict())
    second = SpectralClip(stopped, lr=1e-2, **everything(base))
    train(second, range(3), lrs)
    with torch.no_grad():
        for param, weight in zip(stopped, weights, strict=True):
            param.copy_(weight)
    # What a file on another device, or another framework's counter, makes of it.
    state["param_groups"][0]["step"] = int(state["param_groups"][0]["step"])
    second.load_state_dict(state)
    train(second, range(2, 8), lrs)
    for a, b in zip(stopped, straight, strict=True):
        assert torch.equal(a, b)
    kept = second.state[stopped[0]]
    assert {value.dtype for value in kept.values()} == {torch.float32}


@pytest.mark.parametrize("copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("base", BASES)
def test_copies_train_on_their_own(copy, base: str) -> None:
    params = params_of(*SHAPES)
    optimizer = SpectralClip(params, lr=1e-2, **everything(base))
    train(optimizer, range(2))
    again = copy(optimizer)
    before = [param.detach().clone() for param in params]
    train(again, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True)), "the original is left alone"
    train(optimizer, range(2, 4))
    for a, b in zip(again.param_groups[0]["params"], params, strict=True):
        assert torch.equal(a, b)


def test_groups_count_and_learn_by_themselves() -> None:
    together, apart = params_of(*SHAPES), params_of(*SHAPES)
    groups: list[dict[str, Any]] = [{"params": together[::2], "lr": 0.02}, {"params": []}]
    optimizer = SpectralClip(groups, **everything("adamw"))
    optimizer.add_param_group({"params": together[1::2], "lr": 0.05})
    parts = [SpectralClip(apart[i::2], lr=lr, **everything("adamw")) for i, lr in ((0, 0.02), (1, 0.05))]
    for step in range(5):
        gen = torch.Generator().manual_seed(step)
        for a, b in zip(together, apart, strict=True):
            a.grad = torch.randn(a.shape, generator=gen)
            b.grad = a.grad.clone()
        for one in (optimizer, *parts):
            one.step()
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_workspace_cuts_batches_without_changing_them() -> None:
    results = []
    for mib in (512, 3):
        params = params_of(*[(128, 256)] * 5)
        optimizer = SpectralClip(params, shared=SpectralConfig(workspace_mib=mib))
        train(optimizer, range(2))
        results.append((len(optimizer.batches), params))
    # One of 128 KiB takes four of it, and six squares of half as much: three in 3 MiB.
    assert [n for n, _ in results] == [1, 2]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_missing_gradient_leaves_the_parameter_alone() -> None:
    params = params_of((8, 12), (8, 12), (8,))
    before = [param.detach().clone() for param in params]
    written: list[torch.Tensor] = []
    optimizer = SpectralClip(params, base="signum")
    optimizer.on_written = written.extend
    params[0].grad = torch.randn(8, 12)
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, True, True]
    assert sorted(map(id, written)) == sorted(map(id, params)), "each once"


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_no_step_waits_for_the_device(base: str, as_tensor: bool) -> None:
    """Not even the first."""
    lr = torch.tensor(1e-2) if as_tensor else 1e-2
    params = params_of(*SHAPES, (40, 1), (64, 64))
    optimizer = SpectralClip(params, lr=lr, pre_clip_c=0.1, **everything(base))
    for guard in (HostSyncs(), NoHostReads(), HostSyncs()):
        for param in params:
            param.grad = torch.randn(param.shape)
        with guard:
            optimizer.pre_clip_()
            optimizer.step()
        assert not isinstance(guard, HostSyncs) or guard.count == 0, guard.sources


def test_cut_vectors_in_any_order(megatron: Megatron) -> None:
    """Ranks that list them in other orders; each is clipped by its own norm."""
    whole, cut = (megatron.run([], ranks, main="tasks.thin:vectors").saved("vectors") for ranks in (1, 2))
    for name, vector in whole[0].items():
        found = torch.cat([part[name] for part in cut])
        torch.testing.assert_close(found, vector, rtol=0, atol=1e-6)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) is no matrix"):
        SpectralClip(params_of((2, 3, 4)))
    params = params_of((4, 4))
    first, second = SpectralClip(params), SpectralClip(params, base="signum")
    train(first, range(1))
    with pytest.raises(
        ValueError, match="base='signum' keeps momentum_buffer, and the state to load has exp_avg"
    ):
        second.load_state_dict(first.state_dict())
