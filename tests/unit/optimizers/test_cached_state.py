"""What is kept of each matrix, in its form in checkpoints: keys, older ones, and ones of other settings."""

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch

from sso_megatron import SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.parallel.shards import even_cut

SHAPES = [(24, 16), (16, 24), (24, 16)]
STATE = {"lam": (), "slope": (), "h": (), "is_cold": ()}
KINDS = [
    pytest.param(
        SSO, {}, {"right_vectors": (16, 16)} | STATE, {"left_vectors": (16, 16)} | STATE, id="sso"
    ),
    pytest.param(
        SSO,
        {"radius_mode": "from_weights", "power_block": 8},
        {"right_vectors": (16, 8)} | STATE | {"radius": (), "radius_scaler": ()},
        {"left_vectors": (16, 8)} | STATE | {"radius": (), "radius_scaler": ()},
        id="from_weights",
    ),
    pytest.param(
        Spectra, {"rank_ratio": 0.2}, {"spike_vectors": (16, 3)}, {"spike_vectors": (24, 3)}, id="spectra"
    ),
    pytest.param(
        SpectralAdam,
        {},
        {"gradient_vector": (16, 1), "gradient_norm": ()},
        {"gradient_vector": (24, 1), "gradient_norm": ()},
        id="spectral_adam",
    ),
]
FLOAT64 = ("radius_scaler", "gradient_norm")


def trained(kind: Any, num_steps: int, **settings: Any) -> Any:
    """An optimizer of three matrices after some steps; the same for the same arguments."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in SHAPES]
    optimizer = kind(params, **settings)
    step(optimizer, range(num_steps))
    return optimizer


def step(optimizer: Any, numbers: Any) -> list[torch.Tensor]:
    params = optimizer.param_groups[0]["params"]
    for number in numbers:
        gen = torch.Generator().manual_seed(100 + number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=gen)
        optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize(("kind", "settings", "tall", "wide"), KINDS)
def test_keys_shapes_and_dtypes_of_checkpoints(kind: Any, settings: Any, tall: Any, wide: Any) -> None:
    """Written out, since users have such files."""
    states = list(trained(kind, 2, **settings).spectral_state().values())
    found = [{key: tuple(value.shape) for key, value in state.items()} for state in states]
    assert sorted(map(str, found)) == sorted(map(str, [tall, wide, tall]))
    for key, value in itertools.chain(*(state.items() for state in states)):
        wanted = torch.bool if key == "is_cold" else torch.float64 if key in FLOAT64 else torch.float32
        assert value.dtype == wanted and value.device.type == "cpu", key


@pytest.mark.parametrize(("kind", "settings", "tall", "wide"), KINDS)
def test_each_matrix_gets_its_own_state_back(kind: Any, settings: Any, tall: Any, wide: Any) -> None:
    """Whatever the order of the file, and with no step in between."""
    optimizer = trained(kind, 3, **settings)
    saved = optimizer.spectral_state()
    straight = step(trained(kind, 3, **settings), [3, 4])
    optimizer.load_spectral_state(dict(reversed(deepcopy(saved).items())))
    for name, state in optimizer.spectral_state().items():
        assert state.keys() == saved[name].keys()
        assert all(torch.equal(state[key], saved[name][key]) for key in state)
    for found, wanted in zip(step(optimizer, [3, 4]), straight, strict=True):
        assert torch.equal(found, wanted)


def test_a_checkpoint_without_h_has_found_its_root() -> None:
    """Earlier revisions did not save ``h``: the search goes on as from h = 0, and is not cold."""
    results = []
    for change in (lambda s: s.pop("h"), lambda s: s.update(h=torch.tensor(0.0))):
        optimizer = trained(SSO, 3)
        states = optimizer.spectral_state()
        for state in states.values():
            change(state)
        optimizer.load_spectral_state(states)
        assert all(
            optimizer.fits(batch, states[member.name])
            for batch in optimizer.batches
            for member in batch.members
        )
        results.append(step(optimizer, [3]))
        assert {int(n) for batch in optimizer.batches for n in batch.stats.num_trials} == {2}
    for without, zero in zip(*results, strict=True):
        assert torch.equal(without, zero)


def test_other_settings_keep_what_still_fits() -> None:
    """Another ``power_block`` asks for other vectors: radius and lam are taken over, the rest is found."""
    settings = {"radius_mode": "from_weights", "radius_scaler": 1.25}
    saved = trained(SSO, 3, **settings).spectral_state()
    optimizer = trained(SSO, 3, **settings, power_block=4)
    optimizer.load_spectral_state(deepcopy(saved))
    batch = optimizer.batches[0]
    assert not optimizer.fits(batch, saved[batch.members[0].name])
    for name, weight, radius in optimizer.retracted():
        assert radius == saved[name]["radius"].item()
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(radius, rel=1e-4)
    for batch in optimizer.batches:
        assert batch.cache.is_cold
        for member, lam in zip(batch.members, batch.cache.lam, strict=True):
            assert torch.equal(lam, saved[member.name]["lam"])


def test_another_radius_scaler_scales_the_saved_radius() -> None:
    saved = trained(SSO, 3, radius_mode="from_weights", radius_scaler=1.25).spectral_state()
    optimizer = trained(SSO, 3, radius_mode="from_weights", radius_scaler=2.5)
    optimizer.load_spectral_state(deepcopy(saved))
    for name, _, radius in optimizer.retracted():
        assert radius == 2 * saved[name]["radius"].item()
    again = optimizer.spectral_state()
    assert all(state["radius_scaler"] == 2.5 for state in again.values())
    assert all(torch.equal(again[name]["radius"], 2 * saved[name]["radius"]) for name in saved)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SSO, {}),
        (SSO, {"solver": "bisection"}),
        (MuonSphere, {}),
        (Spectra, {}),
        (SpectralAdam, {}),
        (SpectralClip, {}),
    ],
)
def test_default_workspace_covers_every_algorithm_here(kind: Any, settings: dict[str, Any]) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(4, 4))], **settings)
    for shape in itertools.product((32, 64, 256, 1024, 4096), repeat=2):
        default = SpectralOptimizer.workspace(optimizer, shape, torch.float32)
        assert optimizer.workspace(shape, torch.float32) <= default
        for cut in (even_cut(shape, 0, 2), even_cut(shape, 1, 2)):
            default = SpectralOptimizer.cut_workspace(optimizer, cut, torch.float32)
            assert not cut.is_long_side or optimizer.cut_workspace(cut, torch.float32) <= default
