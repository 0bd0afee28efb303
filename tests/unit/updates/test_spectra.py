"""Spectra against its published iteration in float64, and against exact SVD; whole and cut matrices."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from helpers import oracle
from helpers.comparisons import worst_error
from helpers.megatron_runs import Megatron
from helpers.numerics.cuts import CUT, whole_and_cut
from helpers.numerics.problems import low_rank_problem, noise_problem, start
from helpers.numerics.step_costs import assert_waits_once, assert_workspace
from sso_megatron import Spectra, SpectraConfig, SpectralConfig
from sso_megatron.cli.bench.meters import Flops
from sso_megatron.linalg.block_iteration import find_block
from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.polar import msign
from sso_megatron.linalg.shard_view import ShardView
from sso_megatron.updates.spectra import SpectraCache, SpectraRule, spectra_step_, spike_rank

NAME = "param_groups[0].params[0]"
SHAPES = [(48, 64), (32, 80), (80, 32), (48, 48)]
RULE = SpectraRule(num_iterations=1, update_rms=0.2, eps=1e-8)
MODES = [
    {},
    {"rank_ratio": 0.0625},
    {"rank_ratio": 0.0625, "nesterov": True, "weight_decay": 0.0},
    {"rank_ratio": 0.0625, "power_iterations": 2, "update_rms": 0.1},
]


def fifty_steps(problem, shape, settings, dtype=torch.float32, from_svd=True) -> float:
    """Relative error of the weight after 50 steps."""
    gradient, exact = problem(shape, 0), start(shape, 0)
    param = torch.nn.Parameter(torch.from_numpy(exact.copy()).to(dtype))
    optimizer = Spectra([param], lr=5e-3, **settings)
    c = optimizer.config
    rank = spike_rank(shape, c.rank_ratio)
    buffer, V = np.zeros(shape), None
    for number in range(50):
        G = gradient(exact)
        if number == 0 and from_svd:  # from random vectors others are found where gaps are small
            V = np.linalg.svd(G)[2][:rank].T
            vectors = torch.from_numpy(V.copy()).to(dtype)
            optimizer.load_spectral_state({NAME: {"spike_vectors": vectors}})
        param.grad = torch.from_numpy(G).to(dtype)
        optimizer.step()
        exact, buffer, V = oracle.spectra_step(
            exact,
            buffer,
            V,
            G,
            lr=5e-3,
            rank=rank,
            mu=c.momentum,
            nesterov=c.nesterov,
            passes=c.power_iterations,
            update_rms=c.update_rms,
            eps=c.eps,
            weight_decay=c.weight_decay,
        )
    return float(np.linalg.norm(param.detach().double().numpy() - exact) / np.linalg.norm(exact))


# Two roundings a step; and the published iteration adds eps to the lengths that it divides V by, which are
# more than 1 here, while ours are exact.
BOUNDS = {torch.float32: 2 * 50 * torch.finfo(torch.float32).eps, torch.float64: SpectraConfig().eps}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("problem", [noise_problem, low_rank_problem])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_fifty_steps_follow_the_published_iteration(problem, shape, settings, dtype) -> None:
    assert fifty_steps(problem, shape, settings, dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (48, 48)])
def test_its_own_start_is_as_good_as_an_exact_one(shape) -> None:
    """Where the spike stands out from the tail: a rank of 3, and the block has as many."""
    assert fifty_steps(low_rank_problem, shape, MODES[1], from_svd=False) < BOUNDS[torch.float32]


def spiked(shape: tuple[int, int], values: list[float], seed: int = 0) -> torch.Tensor:
    """Noise of norm about 1, and these singular values."""
    gen = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, len(values), generator=gen)).Q for size in shape)
    noise = torch.randn(shape, generator=gen) / (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    return noise + (U * torch.tensor(values)) @ V.mT


def direction(M: torch.Tensor, V: torch.Tensor, rule: SpectraRule = RULE) -> torch.Tensor:
    """``O`` of one matrix."""
    O, cache = M[None].clone(), SpectraCache(V.clone())  # noqa: E741
    spectra_step_(torch.zeros_like(O), O, cache, lr=0.1, rule=rule, view=ShardView(tuple(M.shape)))
    V.copy_(cache.V)
    return O[0]


@pytest.mark.parametrize("shape", [(128, 128), (128, 300), (300, 128)])
@pytest.mark.parametrize("values", [[50.0, 20.0, 8.0, 3.0], [5.0, 5.0, 5.0, 5.0], [1e4, 1e2, 10.0, 4.0]])
def test_the_spike_becomes_the_tails_rms(shape, values) -> None:
    """Against exact SVD, once the momentum has settled: singular values of O, and O itself."""
    M = spiked(shape, values)
    V = find_block(M[None], len(values), ShardView(shape))
    for _ in range(10):
        O = direction(M, V)  # noqa: E741
    exact = oracle.suppressed_spike(M.double().numpy(), len(values))
    U, S, Vt = np.linalg.svd(M.double().numpy(), full_matrices=False)
    tail_rms = np.sqrt(np.mean(S[len(values) :] ** 2))
    inside = U[:, : len(values)].T @ O.double().numpy() @ Vt[: len(values)].T
    # U^T (M - U Y^T) is zero but for float32's rounding of M, which with the largest values is 2e-3 of the
    # tail, and all that its smallest singular values are.
    bound = max(1e-3, np.finfo(np.float32).eps * S[0] / tail_rms)
    np.testing.assert_allclose(np.linalg.svd(inside, compute_uv=False), tail_rms, rtol=bound)
    assert np.linalg.norm(O.double().numpy() - exact) < 1e-3 * np.linalg.norm(exact)
    found, wanted = (np.linalg.svd(X, compute_uv=False) for X in (O.double().numpy(), exact))
    np.testing.assert_allclose(found, wanted, atol=bound * tail_rms)


def test_a_momentum_that_moves_keeps_its_spike_down() -> None:
    """Warm, one pass a step: the block follows the heavy ball of a training problem."""
    shape, gradient = (128, 200), low_rank_problem((128, 200), 0)
    param = torch.nn.Parameter(torch.from_numpy(start(shape, 0)).float())
    optimizer = Spectra([param], lr=5e-3, rank_ratio=0.02)
    for _ in range(60):
        param.grad = torch.from_numpy(gradient(param.detach().double().numpy())).float()
        optimizer.step()
    S = np.linalg.svd(optimizer.state[param]["momentum_buffer"].double().numpy(), compute_uv=False)
    stats, rank = optimizer.batches[0].stats, 3
    np.testing.assert_allclose(np.sort(stats.spike[0].numpy())[::-1], S[:rank], rtol=1e-4)
    np.testing.assert_allclose(stats.tail_rms.item(), np.sqrt(np.mean(S[rank:] ** 2)), rtol=1e-4)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40)])
@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        ([], 1e-6),
        ([9.0, 3.0], 1e-6),
        ([1e5, 1e3], 1e-3),  # rounding of the spike, 1e-7 of 1e5, is a hundredth of the tail
    ],
)
def test_the_update_has_the_rms_that_is_asked_for(shape, values, tolerance) -> None:
    """RMS(O) without a sum of its own is RMS(O)."""
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Spectra([param], lr=0.01, rank_ratio=0.05, weight_decay=0.0)
    for seed in range(6):
        before = param.detach().clone()
        param.grad = spiked(shape, values) + 0.1 * spiked(shape, [], seed)
        optimizer.step()
        rms = (param.detach() - before).double().square().mean().sqrt().item()
        assert rms == pytest.approx(0.01 * 0.2, rel=tolerance)


def test_ranks_and_shapes_at_the_edge() -> None:
    assert [spike_rank((q, 9000), 0.015) for q in (1, 2, 3, 64, 100, 512, 2048, 8192)] == [
        *(0, 1, 1, 1, 2, 8, 31, 123)
    ]
    assert spike_rank((4, 4), 0.99) == 3
    gen = torch.Generator().manual_seed(0)
    for shape in ((1, 7), (7, 1), (1, 1), (2, 2), (2, 9), (9, 3)):
        param = torch.nn.Parameter(torch.randn(shape, generator=gen))
        optimizer = Spectra([param], lr=0.01, rank_ratio=0.9)
        for _ in range(4):
            param.grad = torch.randn(shape, generator=gen)
            optimizer.step()
            assert torch.isfinite(param).all()


def test_a_vector_has_no_spike() -> None:
    """Its step is the momentum at the update's root mean square."""
    param = torch.nn.Parameter(torch.zeros(1, 30))
    optimizer = Spectra([param], lr=0.1)
    param.grad = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    wanted = -0.1 * 0.2 * param.grad / param.grad.square().mean().sqrt()
    torch.testing.assert_close(param.detach(), wanted)


@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"momentum_dtype": "bf16"}])
def test_a_zero_momentum_moves_nothing_but_by_weight_decay(settings) -> None:
    """At the first step and later, and the block is not lost over it."""
    gen = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(20, 30, generator=gen))
    optimizer = Spectra([param], lr=0.1, momentum=0.0, weight_decay=0.5, rank_ratio=0.1, **settings)
    for number in range(6):
        before, is_zero = param.detach().clone(), number in (0, 3)
        V = optimizer.batches[0].cache.V.clone() if number else None
        param.grad = torch.zeros(20, 30) if is_zero else torch.randn(20, 30, generator=gen)
        optimizer.step()
        if is_zero:
            torch.testing.assert_close(param.detach(), before * (1 - 0.1 * 0.5))
            assert V is None or torch.equal(optimizer.batches[0].cache.V, V)
        else:
            assert (param.detach() - before * (1 - 0.1 * 0.5)).square().mean().sqrt() > 0.1 * 0.19
        assert torch.isfinite(param).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(60, 40), (40, 200)])
def test_a_momentum_without_a_tail_steps_along_its_polar_factor(rank, shape) -> None:
    """Rank 3 and less in a block of 3: not along rounding, which is all that is left of the tail."""
    gen = torch.Generator().manual_seed(0)
    M = torch.randn(shape[0], rank, generator=gen) @ torch.randn(rank, shape[1], generator=gen)
    V = find_block(M[None], 3, ShardView(shape))
    for _ in range(5):
        O = direction(M, V)  # noqa: E741
    U, _, Vt = np.linalg.svd(M.double().numpy(), full_matrices=False)
    wanted = U[:, :rank] @ Vt[:rank]
    found = O.double().numpy() / np.linalg.norm(O.double().numpy(), ord=2)
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
    other = torch.randn(shape, generator=gen)  # the spare columns of the block find what comes later
    for _ in range(30):
        direction(other, V)
    assert torch.linalg.matrix_rank(V[0]) == 3


def test_scales_of_the_momentum_do_not_matter() -> None:
    rule = SpectraRule(num_iterations=1, update_rms=0.2, eps=1e-45)
    M = spiked((60, 90), [9.0, 4.0])
    wanted = None
    for scale in (1.0, 1e-12, 1e12):
        W, V = torch.zeros(1, 60, 90), find_block(scale * M[None], 2, ShardView((60, 90)))
        spectra_step_(W, scale * M[None], SpectraCache(V), lr=1.0, rule=rule, view=ShardView((60, 90)))
        wanted = W if wanted is None else wanted
        torch.testing.assert_close(W, wanted, rtol=1e-3, atol=1e-5)


def test_float64_and_a_learning_rate_on_the_device() -> None:
    weights = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        W, M = torch.zeros(1, 30, 40, dtype=torch.float64), spiked((30, 40), [5.0])[None].double()
        V = find_block(M, 2, ShardView((30, 40)))
        spectra_step_(W, M, SpectraCache(V), lr=lr, rule=RULE, view=ShardView((30, 40)))
        weights.append(W)
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)


def test_state_is_half_of_adamws() -> None:
    """``mn + nk`` numbers, as published: 50.75 % of AdamW's; half of that with a bf16 momentum."""

    def state_bytes(optimizer: torch.optim.Optimizer, shape: tuple[int, int]) -> int:
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.randn(shape)
        optimizer.step()
        kept = [v for v in optimizer.state[param].values() if v.ndim == 2]
        if isinstance(optimizer, Spectra):
            kept.append(optimizer.batches[0].cache.V)
        return sum(value.numel() * value.element_size() for value in kept)

    for shape in ((1024, 3072), (3072, 1024), (1024, 1024)):
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
        adamw = state_bytes(torch.optim.AdamW([params[0]]), shape)
        assert state_bytes(Spectra([params[1]]), shape) / adamw <= 0.51
        assert state_bytes(Spectra([params[2]], momentum_dtype="bf16"), shape) / adamw <= 0.26


@pytest.mark.parametrize("ratio", [0.015, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(512, 512), (256, 1024), (1024, 256)])
def test_workspace_is_what_a_step_takes(ratio, shape) -> None:
    assert_workspace(Spectra, shape, 0.5, rank_ratio=ratio)


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": True}, {"momentum_dtype": "bf16"}, {"power_iterations": 3}]
)
def test_the_first_step_is_the_only_one_that_waits(settings) -> None:
    shapes = [(96, 96), (96, 96), (128, 80), (48, 192), (8, 8), (40, 1), (1, 5)]
    assert_waits_once(Spectra, shapes, rank_ratio=0.1, **settings)


@pytest.mark.parametrize("shape", [(512, 512), (1536, 512), (512, 1536)])
def test_a_warm_step_takes_four_thin_products(shape: tuple[int, int]) -> None:
    """Of the matrix with ``r`` columns: a hundredth of the flops of Muon's Newton-Schulz steps at most.

    What has no flops counted, such as an SVD, would be a wait for the host: the test above.
    """
    param = torch.nn.Parameter(torch.randn(shape))
    param.grad = torch.randn(shape)
    optimizer = Spectra([param])
    optimizer.step()
    (m, n), r = shape, optimizer.batches[0].cache.V.shape[-1]
    # torch counts a product that adds to its argument only where it is told how.
    in_place = {torch.ops.aten.baddbmm_: lambda W, left, right, *scales, **named: bmm_flop(left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as ours:
        optimizer.step()
    with Flops() as theirs:
        msign(param.grad[None], polar_coefficients("polar_express", 8))
    orthonormalisation = 4 * 2 * m * r * r
    assert 0 < ours.get_total_flops() <= 4 * 2 * m * n * r + orthonormalisation <= theirs.total / 100


# ---------------------------------------------------------------- cut matrices


def test_cut_matrices_follow_whole_ones(megatron: Megatron) -> None:
    """Two real ranks: the same weights, and the whole V on both; three or four sums, of thin factors."""
    whole, cut = whole_and_cut(megatron, "spectra", steps=12)
    assert worst_error(cut, whole) < 1e-5
    assert worst_error(cut, whole, "kept") < 1e-4
    for collectives in cut.saved("collectives"):
        for name, (m, n, dim, _) in CUT.items():
            gram, left, right = 2 * 3 * 3 * 8, 2 * m * 3 * 4, 2 * n * 3 * 4
            thin = [left, right] if dim else [gram, gram, right]
            for step in collectives[name][1:]:
                assert step == [("all_reduce", size) for size in [*thin, 2 * 8]]


# ---------------------------------------------------------------- the optimizer


def test_bf16_momentum_is_close_and_rounded_once() -> None:
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(40, 60)) for _ in range(2)]
    settings = ({}, {"momentum_dtype": "bf16"})
    pair = [Spectra([p], weight_decay=0.0, **s) for p, s in zip(params, settings, strict=True)]
    for _ in range(10):
        gradient = torch.randn(40, 60, generator=gen)
        before = pair[1].state[params[1]].get("momentum_buffer", torch.zeros(40, 60)).float()
        for param, optimizer in zip(params, pair, strict=True):
            param.grad = gradient.clone()
            optimizer.step()
        after = pair[1].state[params[1]]["momentum_buffer"]
        assert after.dtype == torch.bfloat16
        exact = 0.95 * before.double() + gradient.double()
        assert ((after - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()
    error = torch.linalg.norm(params[0] - params[1]) / torch.linalg.norm(params[0])
    assert 0 < error < 0.02


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"rank_ratio": 0.0}, r"rank_ratio=0.0 must lie in \(0, 1\); the default is 0.015"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\); the default is 0.95"),
        ({"power_iterations": 0}, "power_iterations=0 must be at least 1; the default is 1"),
        ({"update_rms": -1.0}, "update_rms=-1.0 must be positive and finite; the default is 0.2"),
        ({"eps": math.inf}, "eps=inf must be positive and finite"),
        (
            {"momentum_dtype": "fp8"},
            "momentum_dtype='fp8' must be one of fp32, bf16; the default",
        ),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Spectra([torch.nn.Parameter(torch.randn(4, 4))], **settings)
    with pytest.raises(TypeError, match="give config or eps, not both"):
        Spectra([torch.nn.Parameter(torch.randn(4, 4))], config=SpectraConfig(), eps=1.0)


def test_batches_equal_single_matrices() -> None:
    gen = torch.Generator().manual_seed(0)
    values = [torch.randn(256, 192, generator=gen) for _ in range(3)]
    results = []
    for mib in (512, 1):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = Spectra(params, shared=SpectralConfig(workspace_mib=mib))
        for _ in range(3):
            for param, value in zip(params, values, strict=True):
                param.grad = value.sin()
            optimizer.step()
        results.append((len(optimizer.batches), params))
    assert results[0][0] == 1 < results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
