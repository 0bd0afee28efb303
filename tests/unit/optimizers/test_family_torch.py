"""Spectra and SpectralAdam as torch optimizers: splits, groups, copies, loading, missing gradients."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch

from helpers.numerics.twin import Twin, random_values
from sso_megatron import SSO, Spectra, SpectralAdam
from sso_megatron.matrices.layout import ParameterLayout, gate_up_splits

KINDS = [
    pytest.param(Spectra, {"rank_ratio": 0.2}, id="spectra"),
    pytest.param(Spectra, {"rank_ratio": 0.2, "nesterov": True}, id="nesterov"),
    pytest.param(Spectra, {"rank_ratio": 0.2, "momentum_dtype": "bf16"}, id="bf16"),
    pytest.param(SpectralAdam, {"period": 2}, id="spectral_adam"),
]
kinds = pytest.mark.parametrize(("kind", "settings"), KINDS)


@kinds
def test_split_parameter_equals_its_matrices(kind: Any, settings: dict[str, Any]) -> None:
    gen = torch.Generator().manual_seed(0)
    fused = torch.randn(48, 32, generator=gen)
    param = torch.nn.Parameter(fused.clone())
    layout = ParameterLayout("fc1", gate_up_splits((48, 32), None, 1, interleave=4))
    parts = [torch.nn.Parameter(half.clone()) for half in halves(fused)]
    split, apart = kind([param], find_layout=lambda p: layout, **settings), kind(parts, **settings)
    for _ in range(4):
        param.grad = torch.randn(48, 32, generator=gen)
        for part, gradient in zip(parts, halves(param.grad), strict=True):
            part.grad = gradient.clone()
        split.step()
        apart.step()
    torch.testing.assert_close(halves(param.detach()), [p.detach() for p in parts], rtol=1e-5, atol=1e-6)


def halves(fused: torch.Tensor) -> list[torch.Tensor]:
    """Gate and up, four rows of each in turn."""
    blocks = fused.unflatten(0, (-1, 2, 4))
    return [blocks[:, i].flatten(0, 1) for i in range(2)]


@kinds
def test_loading_goes_on_to_the_last_bit(kind: Any, settings: dict[str, Any]) -> None:
    """Into an optimizer that has already gone another way, whose learning rate is replaced."""
    twin = Twin(*random_values(torch.float32, torch.bfloat16, torch.float64))
    straight, stopped = twin.params(), twin.params()
    optimizer = kind(straight, lr=0.05, **settings)
    twin.train(straight, [optimizer], range(6))
    first = kind(stopped, lr=0.05, **settings)
    twin.train(stopped, [first], range(3))
    weights, state = [p.detach().clone() for p in stopped], deepcopy(first.state_dict())
    second = kind(stopped, lr=0.4, **settings)
    twin.train(stopped, [second], range(2))
    with torch.no_grad():
        for param, weight in zip(stopped, weights, strict=True):
            param.copy_(weight)
    second.load_state_dict(state)
    for index, param in enumerate(stopped):
        for name, value in second.state[param].items():
            assert value.dtype == state["state"][index][name].dtype
            assert torch.equal(value, state["state"][index][name])
    twin.train(stopped, [second], range(3, 6))
    for a, b in zip(stopped, straight, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "settings"), [*KINDS, pytest.param(SSO, {"radius_scaler": 2.0}, id="sso")]
)
@pytest.mark.parametrize("copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_train_on_their_own(kind: Any, settings: dict[str, Any], copy: Any) -> None:
    twin = Twin(*random_values(torch.float32))
    params = twin.params()
    optimizer = kind(params, lr=0.05, **settings)
    twin.train(params, [optimizer], [0, 1])
    again = copy(optimizer)
    copied = again.param_groups[0]["params"]
    before = params[0].detach().clone()
    twin.train(copied, [again], [2, 3])
    assert torch.equal(params[0].detach(), before), "the original is left alone"
    twin.train(params, [optimizer], [2, 3])
    assert torch.equal(copied[0], params[0])


@pytest.mark.parametrize(("kind", "settings"), [(SSO, {}), *KINDS])
def test_groups_have_their_own_learning_rates_and_dtypes(kind: Any, settings: dict[str, Any]) -> None:
    """Two groups of one shape, a mixed group and moving learning rates against separate optimizers."""
    twin = Twin(*random_values(torch.float32, torch.float32, torch.float64))
    together, apart = twin.params(), twin.params()
    groups = [{"params": [together[0], together[2]], "lr": 0.02}, {"params": [together[1]], "lr": 0.1}]
    parts = [kind([apart[i]], lr=lr, **settings) for i, lr in ((0, 0.02), (1, 0.1), (2, 0.02))]
    whole = kind(groups, **settings)
    assert len(whole.batches) == 3
    lrs = [1.0, 0.5, 2.0, 1.0, 0.25, 1.0]
    twin.train(together, [whole], range(6), lrs)
    twin.train(apart, parts, range(6), lrs)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert together[2].dtype == torch.float64


@kinds
@pytest.mark.parametrize("spoilt", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_missing_and_spoilt_gradients_stay_with_their_matrix(
    kind: Any, settings: dict[str, Any], spoilt: int, value: float
) -> None:
    if kind is Spectra:
        settings = settings | {"rank_ratio": 0.4}  # a spike of several directions
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(8, 12, generator=gen)) for _ in range(3)]
    before = params[1].detach().clone()
    optimizer = kind(params, **settings)
    for step in range(4):
        for param in (params[0], params[2]):
            param.grad = torch.randn(8, 12, generator=gen)
        if step == spoilt:
            params[0].grad[2, 3] = value
        optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert not any(value.any() for value in optimizer.state[params[1]].values())
    assert params[0].isnan().any()
    assert torch.isfinite(params[2]).all()


@kinds
def test_weight_decay_is_decoupled(kind: Any, settings: dict[str, Any]) -> None:
    gen = torch.Generator().manual_seed(0)
    W, G = (torch.randn(12, 20, generator=gen) for _ in range(2))
    results = []
    for decay in (0.0, 0.3):
        param = torch.nn.Parameter(W.clone())
        param.grad = G.clone()
        kind([param], lr=0.1, **settings | {"weight_decay": decay}).step()
        results.append(param.detach())
    torch.testing.assert_close(results[0] - results[1], 0.1 * 0.3 * W, rtol=1e-4, atol=1e-6)


@kinds
def test_it_learns(kind: Any, settings: dict[str, Any]) -> None:
    gen = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 24, generator=gen), torch.randn(24, 16, generator=gen)
    param = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = kind([param], lr=0.05, **settings | {"weight_decay": 0.0})
    losses = []
    for _ in range(150):
        loss = (x @ (param - target)).square().mean()
        param.grad = None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
