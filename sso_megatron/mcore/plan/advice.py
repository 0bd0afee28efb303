"""Warns of what in a plan may not be wanted; each warning names the flag and the way out."""

from argparse import Namespace
from collections.abc import Iterator

from sso_megatron.mcore.flags.optimizers import OPTIMIZERS
from sso_megatron.mcore.plan.records import Matrix, Plan
from sso_megatron.optimizers.settings import default_of

_FAR = 3.0
"""Ratio beyond which a radius is far from an initial norm, or a learning rate from published ones."""

_UNEVEN = 1.25
"""Work of the busiest data-parallel rank, as a multiple of the mean, beyond which a warning is given."""

_SPHERES = (1e-3, 3e-2, "arXiv 2601.08393, sweep over widths")
_PUBLISHED_RATES = {
    "sso": _SPHERES,
    "muon_sphere": _SPHERES,
    "spectra_clip_adamw": (1e-3, 2e-3, "arXiv 2603.14315"),
    "spectra_clip_signum": (1e-3, 5e-3, "arXiv 2603.14315"),
    "spectra_clip_ademamix": (1e-3, 3e-3, "arXiv 2603.14315"),
    "spectral_adam": (3e-4, 3e-4, "its authors' one run"),
}
"""Lowest and highest learning rate and their source; none is published for Spectra (arXiv 2602.11185)."""

_ATTENTION = ("q", "k", "v", "attention gate")


def warnings_of(plan: Plan, args: Namespace) -> list[str]:
    """Return all warnings for a plan that has none yet; ``args`` are Megatron's arguments."""
    found = [*_cut_heads(plan), *_blockwise(plan), *_idle_decay(plan), *_radii(plan), *_rate(plan, args)]
    return [*found, *_repeated(plan), *_uneven(plan), *_workspace(plan)]


def _matrices(plan: Plan) -> Iterator[Matrix]:
    return (m for p in plan.originals for m in p.matrices)


def _cut_heads(plan: Plan) -> Iterator[str]:
    if plan.shared["qkv_split"] not in ("head", "group"):
        return
    cut = {m.kind: 0 for m in _matrices(plan) if m.kind in _ATTENTION}
    for m in _matrices(plan):
        if m.kind in cut and m.tp_mode not in ("local", "blockwise"):
            cut[m.kind] += 1
    kinds = [f"{count} of kind {kind}" for kind, count in cut.items() if count]
    if kinds:
        size = plan.parallel["tensor"]
        yield (
            f"--tensor-model-parallel-size {size} cuts heads or groups of attention "
            f"({', '.join(kinds)}): the ranks that share them exchange them in every step; a size that "
            "divides --num-query-groups leaves them whole"
        )


def _blockwise(plan: Plan) -> Iterator[str]:
    count = sum(m.tp_mode == "blockwise" for m in _matrices(plan))
    if count:
        yield (
            f"--spectral-tp-mode blockwise makes a matrix of each of {count} shards: another algorithm, "
            "whose result depends on --tensor-model-parallel-size; leave it out for the cheapest exact mode"
        )


def _idle_decay(plan: Plan) -> Iterator[str]:
    decay = plan.settings.get("weight_decay")
    if decay and plan.settings.get("retract_mode") == "hard":
        yield (
            f"--sso-weight-decay {decay} has no effect: hard retraction undoes it; leave it out, or use "
            "--sso-retract-mode dynamic"
        )


def _radii(plan: Plan) -> Iterator[str]:
    far: dict[tuple[str, tuple[int, int]], Matrix] = {}
    for m in _matrices(plan):
        if m.radius and m.initial_norm and not 1 / _FAR <= m.radius / m.initial_norm <= _FAR:
            far.setdefault((m.kind, m.shape), m)
    if far:
        listed = "; ".join(
            f"{kind} {m.shape[0]} x {m.shape[1]}: R {m.radius:.3g}, norm {m.initial_norm:.3g}"
            for (kind, _), m in far.items()
        )
        yield (
            f"radii are further than a factor {_FAR:g} from the first weights' norms, so that the first "
            f"retraction changes the model ({listed}); --spectral-mup-init draws weights on their spheres, "
            "--init-method-std and --sso-radius-scaler change either side"
        )


def _rate(plan: Plan, args: Namespace) -> Iterator[str]:
    modes = [name for name in ("radius_mode", "scale_mode") if name in plan.settings]
    config_type = OPTIMIZERS[args.optimizer].config_cls
    if any(plan.settings[name] != default_of(config_type, name) for name in modes):
        return  # then the same rate means another step
    low, high, source = _PUBLISHED_RATES.get(args.optimizer, (0.0, float("inf"), ""))
    if args.lr is not None and not low / _FAR <= args.lr <= high * _FAR:
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        yield (
            f"--lr {args.lr:g} is far outside of what is published for --optimizer {args.optimizer}: "
            f"{span} ({source}); give another, unless it was tried"
        )


def _repeated(plan: Plan) -> Iterator[str]:
    replicas = plan.parallel["data"] * plan.parallel["context"]
    if replicas > 1 and not plan.is_sharded:
        yield (
            f"each of {replicas} data-parallel ranks takes the whole spectral step and keeps all of the "
            "optimizer's state; --use-distributed-optimizer shares both out"
        )


def _uneven(plan: Plan) -> Iterator[str]:
    if plan.is_sharded and plan.imbalance() > _UNEVEN:
        yield (
            f"the busiest data-parallel rank has {plan.imbalance():.2f} times the mean work of its group: "
            "there are few matrices for so many ranks; a larger --ddp-bucket-size lets more of them be "
            "shared out at a time, and fewer data-parallel ranks (more pipeline stages) give each more"
        )


def _workspace(plan: Plan) -> Iterator[str]:
    bound = plan.shared["workspace_mib"]
    need = -(-plan.largest_workspace >> 20)
    if need > bound:
        rows, columns = plan.largest_shape
        yield (
            f"a matrix of {rows} x {columns} takes {need} MiB of temporary memory, above "
            f"--spectral-workspace-mib {bound}: it is worked on alone, above the bound; give {need} to "
            "have it planned for"
        )
