"""SSO and MuonSphere as torch optimizers: batches, groups, retraction, decay, copies, loading."""

import math
import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch

from helpers import oracle
from helpers.numerics.problems import start
from helpers.numerics.twin import Twin, random_values
from sso_megatron import SSO, MuonSphere, SpectralConfig
from sso_megatron.matrices.layout import ParameterLayout, gate_up_splits
from sso_megatron.optimizers.measures import StepMeasures


def test_batches_equal_single_matrices() -> None:
    """Matrices of one shape are worked on together, with the same result as alone."""
    gen = torch.Generator().manual_seed(0)
    values = [torch.randn(24, 40, generator=gen) for _ in range(5)]
    gradients = [[torch.randn(24, 40, generator=gen) for _ in values] for _ in range(6)]
    together = [torch.nn.Parameter(v.clone()) for v in values]
    alone = [torch.nn.Parameter(v.clone()) for v in values]
    optimizers = [SSO(together), *(SSO([p]) for p in alone)]
    assert len(optimizers[0].batches) == 1
    for step in gradients:
        for params in (together, alone):
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_workspace_cuts_batches_without_changing_them() -> None:
    gen = torch.Generator().manual_seed(0)
    values = [torch.randn(128, 256, generator=gen) for _ in range(5)]
    results = []
    for mib in (512, 3):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        optimizer = SSO(params, shared=SpectralConfig(workspace_mib=mib))
        for p in params:
            p.grad = p.detach().clone().sin()
        optimizer.step()
        results.append((len(optimizer.batches), params))
    # One of 128 KiB takes four of it, four squares of half as much, and a little: four in 3 MiB.
    assert [n for n, _ in results] == [1, 2]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_split_parameter_equals_its_matrices() -> None:
    gen = torch.Generator().manual_seed(0)
    fused = torch.randn(48, 32, generator=gen)
    gradient = torch.randn(48, 32, generator=gen)
    param = torch.nn.Parameter(fused.clone())
    layout = ParameterLayout("fc1", gate_up_splits((48, 32), None, 1))
    parts = [torch.nn.Parameter(fused[:24].clone()), torch.nn.Parameter(fused[24:].clone())]
    split, apart = SSO([param], find_layout=lambda p: layout), SSO(parts)
    for _ in range(3):
        param.grad = gradient.clone()
        for p, g in zip(parts, gradient.chunk(2), strict=True):
            p.grad = g.clone()
        split.step()
        apart.step()
    torch.testing.assert_close(param.detach(), torch.cat([p.detach() for p in parts]))
    sigma = torch.stack([m for _, m, _ in split.retracted()])
    norms = torch.linalg.matrix_norm(sigma.double(), ord=2)
    torch.testing.assert_close(
        norms, torch.full((2,), math.sqrt(24 / 32), dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_dynamic_retraction_is_equation_34() -> None:
    W = start((20, 30), 0)
    for scaler, sign in ((100.0, 1), (1e-4, -1)):
        param = torch.nn.Parameter(torch.from_numpy(W).float())
        settings = {"retract_mode": "dynamic", "retract_alpha": 0.5, "radius_scaler": scaler}
        optimizer = MuonSphere([param], lr=0.1, **settings)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        expected = W * (1 + 0.5 * 0.1 * sign)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-5)


def measured_step(optimizer: SSO) -> dict[str, float]:
    """A step of an optimizer of one matrix, and what it reports."""
    optimizer.measures = StepMeasures()
    optimizer.step()
    (row,) = optimizer.measures.whole.values()
    return dict(zip(optimizer.columns, row.tolist(), strict=True))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("spectral_mup", 2.0 * math.sqrt(20 / 45)),
        ("align_adam_rms", 0.2 * math.sqrt(45)),
        ("spectral_kaiming", 1.0),
    ],
)
def test_scale_modes(mode: str, expected: float) -> None:
    """The update of MuonSphere has spectral norm lr * scale (msign's singular values are 1).

    By R it is what the optimizer reports as its relative step.
    """
    W = start((20, 45), 0)
    param = torch.nn.Parameter(torch.from_numpy(W).float())
    optimizer = MuonSphere([param], lr=0.01, scale_mode=mode, radius_scaler=2.0)
    param.grad = torch.randn(20, 45, generator=torch.Generator().manual_seed(0))
    reported = measured_step(optimizer)
    sigma, _, _ = oracle.top_triplet(W)
    radius = 2.0 * math.sqrt(20 / 45)
    step = W * (radius / sigma) - param.detach().double().numpy()
    values = np.linalg.svd(step, compute_uv=False)
    np.testing.assert_allclose(values, 0.01 * expected, rtol=1e-3)
    assert reported["relative_step"] == pytest.approx(0.01 * expected / radius, rel=1e-6)


@pytest.mark.parametrize("tangent", ["solve", "project", "none"])
def test_zero_momentum_moves_nothing_off_the_sphere(tangent: str) -> None:
    """After real steps, too, when lam is no longer 0; and the search starts where it left off."""
    gen = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(20, 30, generator=gen))
    optimizer = SSO([param], tangent=tangent, lr=0.05, momentum=0.0)
    for _ in range(5):
        param.grad = torch.randn(20, 30, generator=gen)
        optimizer.step()
    lam = optimizer.batches[0].cache.lam.clone()
    before = param.detach().clone()
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    sigma, _, _ = oracle.top_triplet(before.double().numpy())
    expected = before * (math.sqrt(20 / 30) / sigma)
    torch.testing.assert_close(param.detach(), expected.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(optimizer.batches[0].cache.lam, lam)


def test_a_missing_gradient_leaves_the_parameter_alone() -> None:
    params = [torch.nn.Parameter(torch.randn(8, 12)) for _ in range(2)]
    before = params[1].detach().clone()
    optimizer = SSO(params)
    params[0].grad = torch.randn(8, 12)
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert not optimizer.state[params[1]]["momentum_buffer"].any()


def test_weight_decay_is_undone_by_hard_retraction() -> None:
    results = []
    for decay in (0.0, 0.3):
        param = torch.nn.Parameter(torch.from_numpy(start((20, 30), 0)).float())
        optimizer = SSO([param], lr=0.1, weight_decay=decay)
        param.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("retract_mode", ["hard", "dynamic"])
def test_reported_norms_are_those_before_weight_decay(retract_mode: str) -> None:
    """The step finds the norm after it, here of half the weight."""
    W = start((20, 30), 0)
    param = torch.nn.Parameter(torch.from_numpy(W).float())
    optimizer = MuonSphere([param], lr=0.1, weight_decay=5.0, retract_mode=retract_mode)
    param.grad = torch.ones_like(param)
    reported = measured_step(optimizer)
    sigma, radius = np.linalg.norm(W, ord=2), math.sqrt(20 / 30)
    assert reported["spectral_norm"] == pytest.approx(sigma, rel=1e-5)
    assert reported["radius_error"] == pytest.approx(sigma / radius - 1, rel=1e-5)


def test_weight_decay_under_dynamic_retraction() -> None:
    W = start((20, 30), 0)
    param = torch.nn.Parameter(torch.from_numpy(W).float())
    optimizer = MuonSphere([param], lr=0.1, weight_decay=0.3, retract_mode="dynamic", retract_alpha=0.5)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = W * (1 - 0.1 * 0.3) * (1 + 0.5 * 0.1)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-5)


def test_weight_of_norm_zero_is_named() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 6))
    param.grad = torch.ones(4, 6)
    optimizer = SSO([("first", param)])
    for _ in range(2):  # a second try is no way around it
        with pytest.raises(ValueError, match=r"first: a weight of spectral norm 0 .*initialise it"):
            optimizer.step()


def test_weights_that_are_not_finite_are_named() -> None:
    param = torch.nn.Parameter(torch.full((4, 6), torch.nan))
    param.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"first: a weight of spectral norm 0 \(or not finite\)"):
        SSO([("first", param)]).step()


def test_nan_gradients_spoil_their_own_matrix_alone() -> None:
    """As with every torch optimizer NaN in is NaN out, without an exception that one rank sees alone."""
    params = [torch.nn.Parameter(torch.randn(8, 12)) for _ in range(2)]
    optimizer = SSO(params)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(8, 12)
        if step == 1:
            params[0].grad[2, 3] = torch.nan
        optimizer.step()
    assert params[0].isnan().all()
    assert torch.isfinite(params[1]).all()


def test_bfloat16_parameters_keep_a_float32_momentum() -> None:
    param = torch.nn.Parameter(torch.randn(8, 12).bfloat16())
    optimizer = SSO([param])
    for _ in range(3):
        param.grad = torch.randn(8, 12).bfloat16()
        optimizer.step()
    loaded = SSO([param])
    loaded.load_state_dict(optimizer.state_dict())
    momentum = optimizer.state[param]["momentum_buffer"]
    assert momentum.dtype == torch.float32
    assert torch.equal(loaded.state[param]["momentum_buffer"], momentum), "to the last bit"
    assert param.dtype == torch.bfloat16


def test_what_it_was_built_with_wins_over_a_checkpoint() -> None:
    """But for learning rates, which torch's schedulers expect to find again."""
    (value,) = random_values(torch.float32)
    params = [torch.nn.Parameter(value.clone()) for _ in range(2)]
    first, second = SSO([params[0]], lr=0.1), SSO([params[1]], lr=0.2, momentum=0.0, nesterov=False)
    for p, o in zip(params, (first, second), strict=True):
        p.grad = value.sin()
        o.step()
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.1
    params[1].grad = value.cos()
    second.step()
    torch.testing.assert_close(second.state[params[1]]["momentum_buffer"], value.cos())


def test_float64_follows_the_oracle_closely() -> None:
    gen = np.random.default_rng(0)
    exact, buffer = start((32, 60), 0), np.zeros((32, 60))
    param = torch.nn.Parameter(torch.from_numpy(exact.copy()))
    optimizer = SSO([param], lr=5e-3, msign_steps=20, solver_trials=8)
    radius = math.sqrt(32 / 60)
    for _ in range(10):
        G = gen.standard_normal((32, 60))
        param.grad = torch.from_numpy(G)
        optimizer.step()
        exact, buffer = oracle.sso_step(exact, buffer, G, lr=5e-3, radius=radius, scale=radius)
    assert np.abs(param.detach().numpy() - exact).max() < 1e-7


def test_looking_at_weights_does_not_change_training() -> None:
    twin = Twin(*random_values(torch.float32))
    seen, unseen = twin.params(), twin.params()
    looker, other = SSO(seen, lr=0.05), SSO(unseen, lr=0.05)
    for step in range(6):
        list(looker.retracted())
        twin.train(seen, [looker], [step])
        twin.train(unseen, [other], [step])
    assert torch.equal(seen[0], unseen[0])


@pytest.mark.parametrize("copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_leaves_a_scheduler_and_hooks_behind(copy) -> None:
    """A scheduler puts its own ``step`` on the optimizer that it was made for."""
    optimizer = SSO([torch.nn.Parameter(torch.randn(6, 4))])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.register_step_pre_hook(lambda *_: None)
    again = copy(optimizer)
    for one in (optimizer, again):
        one.param_groups[0]["params"][0].grad = torch.ones(6, 4)
    before = [one.param_groups[0]["params"][0].detach().clone() for one in (optimizer, again)]
    again.step()
    after = [one.param_groups[0]["params"][0].detach() for one in (optimizer, again)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("solver", ["tracking", "bisection"])
def test_loading_goes_on_from_there(solver: str) -> None:
    """Into an optimizer that has already gone another way."""
    twin = Twin(*random_values(torch.float32))
    straight, stopped = twin.params(), twin.params()
    optimizer = SSO(straight, lr=0.05, solver=solver)
    twin.train(straight, [optimizer], range(6))
    first = SSO(stopped, lr=0.05, solver=solver)
    twin.train(stopped, [first], range(3))
    weights, state = [p.detach().clone() for p in stopped], first.state_dict()
    second = SSO(stopped, lr=0.4, solver=solver)
    twin.train(stopped, [second], range(2))
    with torch.no_grad():
        stopped[0].copy_(weights[0])
    second.load_state_dict(deepcopy(state))
    twin.train(stopped, [second], range(3, 6))
    assert torch.equal(stopped[0], straight[0])


def test_state_without_h_is_gone_on_from() -> None:
    """As checkpoints have it that were written before ``h`` was kept."""
    twin = Twin(*random_values(torch.float32))
    params = twin.params()
    optimizer = SSO(params, lr=0.05)
    twin.train(params, [optimizer], range(5))
    state = deepcopy(optimizer.state_dict())
    assert all(abs(kept.pop("h")) < 0.3 for kept in state["spectral"].values())
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = SSO(again, lr=0.05)
    loaded.load_state_dict(state)
    twin.train(params, [optimizer], range(5, 6))
    twin.train(again, [loaded], range(5, 6))
    torch.testing.assert_close(again[0], params[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a search that starts anew is told apart
        assert loaded.batches[0].stats.lam == pytest.approx(optimizer.batches[0].stats.lam, abs=1e-3)


def test_closure_and_schedulers_work() -> None:
    model = torch.nn.Linear(12, 8, bias=False)
    optimizer = SSO(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    x, y = torch.randn(32, 12), torch.randn(32, 8)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(float(optimizer.step(closure)))
        scheduler.step()
    assert losses[-1] < losses[0]


def test_muon_sphere_is_sso_without_tangent() -> None:
    results = []
    for make in (lambda p: MuonSphere(p, lr=0.05), lambda p: SSO(p, lr=0.05, tangent="none")):
        param = torch.nn.Parameter(torch.from_numpy(start((20, 30), 0)).float())
        optimizer = make([param])
        param.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
