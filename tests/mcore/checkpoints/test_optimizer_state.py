"""State of the torch optimizers: saved, loaded and gone on with to the last bit."""

import copy

import pytest
import torch

from helpers.numerics.twin import Twin, random_values
from sso_megatron import SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = {
    "sso": lambda p: SSO(p, lr=0.05),
    "bisection": lambda p: SSO(p, lr=0.05, solver="bisection"),
    "muon_sphere": lambda p: MuonSphere(p, lr=0.05),
    "from_weights": lambda p: SSO(p, lr=0.05, radius_mode="from_weights", radius_scaler=1.3),
    "spectra": lambda p: Spectra(p, lr=0.05),
    "spectral_adam": lambda p: SpectralAdam(p, lr=0.05, period=4),
    "clipped ademamix": lambda p: SpectralClip(p, lr=0.05, base="ademamix", train_steps=6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tmp_path) -> None:
    """Through a file, after three of six steps."""
    twin = Twin(*random_values(*DTYPES))
    straight, before, after = twin.params(), twin.params(), twin.params()
    twin.train(straight, [KINDS[kind](straight)], range(6))
    first = KINDS[kind](before)
    twin.train(before, [first], range(3))
    torch.save((first.state_dict(), before), tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt", weights_only=False)
    for param, weight in zip(after, weights, strict=True):
        param.data.copy_(weight)
    second = KINDS[kind](after)
    second.load_state_dict(state)
    twin.train(after, [second], range(3, 6))
    for a, b in zip(straight, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["muon_sphere", "bisection"])
def test_the_search_starts_anew_after_optimizers_that_set_no_start(kind) -> None:
    """Two trials from a lambda that nobody has looked for would not find it."""
    twin = Twin(*random_values(torch.float32, torch.float32))
    params = twin.params()
    first, second = KINDS[kind](params), SSO(params, lr=0.05)
    twin.train(params, [first], range(3))
    second.load_state_dict(first.state_dict())
    twin.train(params, [second], range(3, 4))
    (batch,) = second.batches
    assert batch.stats.converged.all() and (batch.stats.num_trials > 2).all()


def test_what_was_loaded_is_saved_again_before_a_step() -> None:
    """Also after a copy, and after a group was added."""
    twin = Twin(*random_values(torch.float32))
    params = twin.params()
    first, second = SSO(params), SSO(params)
    twin.train(params, [first], range(3))
    saved = first.state_dict()["spectral"]
    second.load_state_dict(first.state_dict())
    second.add_param_group({"params": [torch.nn.Parameter(torch.randn(4, 6))]})
    for optimizer in (first, second, copy.deepcopy(second)):
        kept = optimizer.state_dict()["spectral"]
        for name, state in saved.items():
            for key, value in state.items():
                assert torch.equal(kept[name][key], value)
    second.reset_caches()
    assert not second.state_dict()["spectral"]
