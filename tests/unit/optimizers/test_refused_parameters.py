"""Parameters, groups and states that would be stepped on wrongly, or without what was asked for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sso_megatron import SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip

KINDS = [SSO, MuonSphere, Spectra, SpectralAdam, SpectralClip]
kinds = pytest.mark.parametrize("kind", KINDS)


def matrix(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(4, 6).to(dtype), requires_grad=dtype.is_floating_point)


@kinds
@pytest.mark.parametrize("key", ["msign_steps", "tangent", "betas", "use_muon", "Lr", "momentum_dtype"])
def test_a_key_of_a_group_that_nobody_reads(kind: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} in a parameter group is not read"):
        kind([{"params": [matrix()], key: 1}, {"params": [matrix()]}])
    optimizer = kind([matrix()])
    with pytest.raises(ValueError, match=f"^{key} in a parameter group is not read"):
        optimizer.add_param_group({"params": [matrix()], key: 1})
    assert len(optimizer.param_groups) == 1


@kinds
def test_keys_of_schedulers(kind: Any) -> None:
    keys = {"initial_lr": 0.1, "max_lr": 0.1, "min_lr": 0.0, "param_names": ["a"], "lr_mult": 1.0}
    optimizer = kind([{"params": [matrix()], "lr": 0.1, **keys}])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9, cycle_momentum=False)
    optimizer.step()
    scheduler.step()
    kind([matrix()]).load_state_dict(optimizer.state_dict())


DTYPES = [torch.complex64, torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn]


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(kind: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"a parameter of dtype {dtype} has no spectral step; it must be"):
        kind([matrix(dtype)])
    for known in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        kind([matrix(known)])


@kinds
@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_the_state_of_another_optimizer(kind: Any, other: Any) -> None:
    param = matrix()
    param.grad = torch.ones(4, 6)
    source = other([param], lr=0.1, **({"momentum": 0.9} if other is torch.optim.SGD else {}))
    source.step()
    optimizer = kind([param])
    with pytest.raises(ValueError, match=r"load the state of the same (optimizer|base)$"):
        optimizer.load_state_dict(source.state_dict())


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@kinds
def test_tensors_of_fsdp2(kind: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(6, 4, bias=False)
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"a parameter of shape \(4, 6\) is a DTensor, whose shards no step"
    ):
        kind(model.parameters())
