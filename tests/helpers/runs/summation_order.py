"""Whether two bf16 runs differ by more than rounding does, which is measured on one rank.

A layout sums in another order than one rank, and bf16 rounds after eight bits: losses, and much more so
steps, which magnify what is small in a gradient, say little by themselves. How much they may differ is
what two other orders of summation make of the same run on one rank; see ``helpers.probes.rounding``.
"""

from collections.abc import Sequence

import torch

from helpers.megatron_runs import Megatron, Run, expert_by_itself

WATCH = ("probes:weights", "probes.rounding:first_steps")
ORDERS = ("probes.rounding:sum_in_halves", "probes.rounding:sum_in_quarters")

# How many times further from the reference than the further of the reorderings a run may be. What is
# compared of a matrix has thousands of entries, so that two orders change it equally much but for some
# per cent; losses of a run are some numbers that depend on each other, and scatter by a factor of two.
# As for the normal, SSO's promise is the unit, 1e-4 for the singular vectors that it found: ten times as
# much are left to them. Steps that are not held to the tangent have several per cent.
MOST = {
    "first moves": 2.0,
    "first momenta": 2.0,
    "moves": 2.0,
    "momenta": 2.0,
    "losses": 3.0,
    "normal": 10.0,
}
PROMISED_TANGENCY = 1e-4


def reordered(megatron: Megatron, argv: list[str]) -> list[Run]:
    """One rank's runs of ``argv`` with sums in other orders."""
    return [megatron.train(argv, calls=(order, *WATCH)) for order in ORDERS]


def assert_within_rounding(run: Run, reference: Run, reorderings: Sequence[Run]) -> None:
    """Losses, weights and momenta agree as far as bf16 lets them, and the run steps along its spheres."""
    found = times_rounding(run, reference, reorderings)
    print({kind: f"{times:.2g}" for kind, times in found.items()})
    apart = {kind: times for kind, times in found.items() if times > MOST[kind]}
    assert not apart, apart


def times_rounding(run: Run, reference: Run, reorderings: Sequence[Run]) -> dict[str, float]:
    """How far a run is from the reference by how far the reorderings are, in the worst matrix, by kind."""
    known = [_apart(other, reference) for other in reorderings]
    worst: dict[str, float] = {}
    for (kind, name), value in _apart(run, reference).items():
        times = value / max(other[kind, name] for other in known)
        worst[kind] = max(worst.get(kind, 0.0), times)
    return worst | {"normal": _along_normals(run) / PROMISED_TANGENCY}


def relative_losses(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Root mean square over the iterations of the relative differences."""
    pairs = zip(losses, reference, strict=True)
    apart = torch.tensor([got / wanted - 1 for got, wanted in pairs], dtype=torch.float64)
    return apart.square().mean().sqrt().item()


def _apart(run: Run, reference: Run) -> dict[tuple[str, str], float]:
    """Relative differences, by kind and matrix."""
    found, wanted = _compared(run), _compared(reference)
    assert found.keys() == wanted.keys()
    errors = {
        key: (torch.linalg.norm(found[key] - value) / torch.linalg.norm(value)).item()
        for key, value in wanted.items()
    }
    return errors | {("losses", "all"): relative_losses(run.losses, reference.losses)}


def _compared(run: Run) -> dict[tuple[str, str], torch.Tensor]:
    initial = _by_name(run, "initial")
    return {
        **{
            ("first moves", n): w - initial[n] for n, w in _by_name(run, "weights after 2 of rank ").items()
        },
        **{("moves", n): w - initial[n] for n, w in _by_name(run, "final").items()},
        **{("first momenta", n): m for n, m in _by_name(run, "momentum after 2 of rank ").items()},
        **{("momenta", n): m for n, m in _by_name(run, "momentum").items()},
    }


def _along_normals(run: Run) -> float:
    """The largest part that a first move has along its sphere's normal ``u v^T``, which SSO removes."""
    before, after = (_by_name(run, f"weights after {count} of rank ") for count in (1, 2))
    parts = []
    for name, weight in before.items():
        left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
        move = after[name].double() - weight.double()
        parts.append((left[:, 0] @ move @ right[0]).abs() / torch.linalg.matrix_norm(move, 2))
    return max(parts).item()


def _by_name(run: Run, saved: str) -> dict[str, torch.Tensor]:
    return {expert_by_itself(name): value for name, value in run.merged(saved).items()}
