"""One training run, whatever the layout: real Megatron over Gloo against one rank, by value.

Every run starts from one rank's checkpoint and takes ten iterations in float32; those in bf16 are in
``test_bf16_layouts.py``. Losses of every iteration agree with the one-rank run to 1e-4, final weights of
every logical matrix and what the run measured of itself to 1e-3, relative.
"""

import re
from collections.abc import Iterable, Sequence

import pytest
import torch

from helpers.megatron_runs import FAMILY, MOE, Megatron, Run, assert_same_run, expert_by_itself, tiny
from helpers.paths import ROOT
from helpers.runs.layouts import (
    DENSE,
    DENSE_LAYOUTS,
    DIST,
    EP2,
    ETP1,
    ITERATIONS,
    MOE_LAYOUTS,
    PP2,
    SP,
    TP_MODES,
)
from helpers.runs.measured import assert_same_measures


class Model:
    """A model that one rank has trained, and that others train from where that one began."""

    def __init__(self, megatron: Megatron, flags: list[object]) -> None:
        self.megatron, self.flags = megatron, flags
        self.reference = self._train([], 1, 1, "sso", ("probes.rehearsal:save_initial_checkpoint",))
        self._others: dict[str, Run] = {}

    def trained_with(self, optimizer: str) -> Run:
        """One rank's run with an optimizer."""
        if optimizer == "sso":
            return self.reference
        if optimizer not in self._others:
            flags = FAMILY.get(optimizer, [])
            self._others[optimizer] = self.train(flags=flags, optimizer=optimizer)
        return self._others[optimizer]

    def train(
        self,
        ranks: int = 1,
        tp: int = 1,
        flags: Sequence[object] = (),
        optimizer: str = "sso",
    ) -> Run:
        load = [
            "--load",
            self.reference.folder / "initial",
            "--finetune",
            "--no-load-optim",
            "--no-load-rng",
        ]
        return self._train([*load, *flags], ranks, tp, optimizer)

    def _train(
        self, flags: list[object], ranks: int, tp: int, optimizer: str, calls: tuple[str, ...] = ()
    ) -> Run:
        length = ["--train-iters", ITERATIONS, "--lr-decay-iters", ITERATIONS - 1]
        length += ["--log-spectral-metrics", ITERATIONS // 2]
        argv = tiny(*self.flags, *length, *flags, tp=tp, optimizer=optimizer)
        if "--multi-latent-attention" in argv:
            argv.remove("--group-query-attention")
        if "--hybrid-layer-pattern" in argv:  # it says where the experts are
            where = argv.index("--moe-layer-freq")
            del argv[where : where + 2]
        return self.megatron.train(argv, ranks, calls=(*calls, "probes:weights"))


@pytest.fixture(scope="module")
def dense(megatron: Megatron) -> Model:
    return Model(megatron, DENSE)


@pytest.fixture(scope="module")
def moe(megatron: Megatron) -> Model:
    return Model(megatron, list(MOE))


def assert_stored_on_the_sphere(run: Run) -> None:
    """Retraction changes what is stored: exact SVD of every logical matrix, read from the parameters.

    The last iteration's learning rate is zero, so that its retraction is all that it does.
    """
    initial, final = run.merged("initial"), run.merged("final")
    for name, (_, radius) in run.merged("retracted").items():
        before, after = (torch.linalg.svdvals(w[name].double())[0].item() for w in (initial, final))
        assert abs(before - radius) > 1e-2 * radius, "Megatron's initial weights are not there"
        assert abs(after - radius) <= 1e-3 * radius, name


def cases(layouts: Iterable[str], most: Iterable[str], some: Iterable[str]) -> list[tuple[str, str]]:
    """Every layout with SSO, most with thin products and one that takes everything, some with the others.

    Each kind of parallelism that ``most`` leaves out is part of a layout in it.
    """
    wide = ("spectra", "spectra_clip_adamw")
    others = sorted({"muon_sphere", *FAMILY} - {"sso", *wide})
    return [
        *((layout, "sso") for layout in layouts),
        *((layout, name) for name in wide for layout in most),
        *((layout, name) for name in others for layout in some),
    ]


def assert_same_training(model: Model, layout: tuple[int, int, list[object]], optimizer: str) -> None:
    ranks, tp, flags = layout
    reference = model.trained_with(optimizer)
    run = model.train(ranks, tp, [*flags, *FAMILY.get(optimizer, [])], optimizer)
    assert_same_run(run, reference)
    assert_same_measures(run, reference)
    assert run.losses[-1] < run.losses[0], "it trains"
    if optimizer in ("sso", "muon_sphere"):
        assert_stored_on_the_sphere(run)
    if optimizer == "spectra_clip_signum":  # it moves weights little: the moves themselves are compared
        assert_same_moves(run, reference)
    norms = [grad_norms(some) for some in (run, reference, model.reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    if "--spectra-clip-pre-clip-c" in FAMILY.get(optimizer, []):
        # The learning rate of the first step is 0, and c above every gradient.
        assert norms[0][0] == pytest.approx(norms[2][0], rel=1e-3)
        assert all(clipped < 0.9 * norm for clipped, norm in zip(norms[0][1:], norms[2][1:], strict=True))


def grad_norms(run: Run) -> list[float]:
    """Of the whole model, as Megatron logs them."""
    return [float(norm) for norm in re.findall(r"grad norm: (\S+)", run.log)]


def assert_same_moves(run: Run, reference: Run) -> None:
    initial, found, wanted = (
        {expert_by_itself(name): weight for name, weight in some.items()}
        for some in (run.merged("initial"), run.merged("final"), reference.merged("final"))
    )
    for name, start in initial.items():
        apart, moved = (torch.linalg.norm(w - wanted[name]).item() for w in (found[name], start))
        assert apart <= 2e-2 * moved, (name, apart / moved)


MOST_DENSE = ["tp4", "pp2-vpp2", "tp2-cp2-sp", "dp4-dist", "tp2-pp2-dp2", "tp2-pp2-dp2-dist", "uneven-pp2"]
MOST_MOE = [
    "ep2-pp2",
    "tp2-ep2-etp2",
    "tp2-etp1-dist",
    "ep2-dp2-dist",
    "grouped-tp2-ep2-etp2",
    "grouped-ep2-dp2-dist",
]


@pytest.mark.parametrize(
    ("layout", "optimizer"), cases(DENSE_LAYOUTS, MOST_DENSE, ["tp2-sp", "pp2", "dp2-dist"])
)
def test_dense(dense: Model, layout: str, optimizer: str) -> None:
    assert_same_training(dense, DENSE_LAYOUTS[layout], optimizer)


@pytest.mark.parametrize(
    ("layout", "optimizer"), cases(MOE_LAYOUTS, MOST_MOE, ["tp2-ep2-etp2", "ep2-dist"])
)
def test_moe(moe: Model, layout: str, optimizer: str) -> None:
    assert_same_training(moe, MOE_LAYOUTS[layout], optimizer)


# Other fused weights: model, then a layout that cuts them.
LATENT = "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 32 --qk-head-dim 16 --v-head-dim 24"
VARIANTS: dict[str, tuple[list[object], tuple[int, int, list[object]]]] = {
    "latent attention": ([*LATENT.split(), "--qk-pos-emb-head-dim", 8], (2, 2, [SP])),
    "gated attention, more tokens": (["--attention-output-gate", "--mtp-num-layers", 1], (4, 4, [])),
    "hybrid": ([*MOE, "--hybrid-layer-pattern", "*-*E"], (4, 2, [SP, *PP2, *EP2, *ETP1])),
    "one query group": ([*DENSE, "--num-query-groups", 1], (4, 4, [])),  # heads begin and end anywhere
    "query groups": ([*DENSE, "--spectral-qkv-split", "group"], (4, 4, [])),
    "fused attention": ([*DENSE, "--spectral-qkv-split", "whole"], (2, 2, [])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_fused_weights(megatron: Megatron, variant: str) -> None:
    flags, layout = VARIANTS[variant]
    model = Model(megatron, flags)
    assert_stored_on_the_sphere(model.reference)
    run = model.train(*layout)
    assert_same_run(run, model.reference)
    assert_same_measures(run, model.reference)
    assert_stored_on_the_sphere(run)


def test_gate_and_up_as_one_matrix(dense: Model) -> None:
    """Each rank stores its slice of both, so that rows come in another order; nothing else differs."""
    runs = [dense.train(tp, tp, ["--spectral-mlp-split", "whole"]) for tp in (1, 2)]
    found, wanted = (
        {name: weight.mT @ weight for name, weight in run.merged("final").items()} for run in reversed(runs)
    )
    for name, gram in wanted.items():
        assert torch.linalg.norm(found[name] - gram) <= 1e-3 * torch.linalg.norm(gram), name
    for got, expected in zip(runs[1].losses, runs[0].losses, strict=True):
        assert abs(got - expected) <= 1e-4 * expected


@pytest.mark.parametrize("mode", TP_MODES)
@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_every_tp_mode_dense(dense: Model, mode: str, layout: str) -> None:
    ranks, tp, flags = DENSE_LAYOUTS[layout]
    run = dense.train(ranks, tp, [*flags, "--spectral-tp-mode", mode])
    assert_same_run(run, dense.reference)
    assert_same_measures(run, dense.reference)
    # Squares that are cut by columns, such as the output projection, go to owners.
    owned = {"owner"} if mode == "distributed" else set()
    assert set().union(*run.saved("modes")) == {"local", mode} | owned


@pytest.mark.parametrize("mode", TP_MODES)
def test_every_tp_mode_moe(moe: Model, mode: str) -> None:
    ranks, tp, flags = MOE_LAYOUTS["tp2-ep2-etp2"]
    run = moe.train(ranks, tp, [*flags, "--spectral-tp-mode", mode])
    assert_same_run(run, moe.reference)
    assert_same_measures(run, moe.reference)
    # Squares that are cut by columns, such as the output projection, go to owners.
    owned = {"owner"} if mode == "distributed" else set()
    assert set().union(*run.saved("modes")) == {"local", mode} | owned


def test_the_support_matrix_is_what_is_tested() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text()
    table = page[page.index("<!-- matrix -->") : page.index("<!-- /matrix -->")]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([^`]+)`", " ".join(first_cells))) == {*DENSE_LAYOUTS, *MOE_LAYOUTS}


def test_vectors_that_are_cut_have_one_norm(megatron: Megatron) -> None:
    """Biases, where every vector is clipped, so that another norm is another step."""
    clipping = ["--spectra-clip-one-dimensional", "continuous", "--spectra-clip-c", 0.5]
    argv = tiny(*clipping, optimizer="spectra_clip_adamw")
    argv.remove("--disable-bias-linear")
    reference = megatron.train(argv, calls=("probes:vectors",))
    for flags in ([SP], [DIST]):
        tp = 2 if flags == [SP] else 1
        cut = tiny(*clipping, *flags, tp=tp, optimizer="spectra_clip_adamw")
        cut.remove("--disable-bias-linear")
        run = megatron.train(cut, 2, calls=("probes:vectors",))
        for name, norm in run.merged("vectors").items():
            assert norm == pytest.approx(reference.merged("vectors")[name], rel=1e-3), name


@pytest.mark.parametrize("mode", TP_MODES)
def test_component_qkv_is_cut_by_tp(dense: Model, mode: str) -> None:
    """Q, K and V as one matrix each: what heads spare, tensor parallelism cuts."""
    split = ["--spectral-qkv-split", "component"]
    reference = dense.train(flags=split)
    assert_same_run(dense.train(2, 2, [*split, "--spectral-tp-mode", mode]), reference)


def test_blockwise_is_another_result(dense: Model) -> None:
    run = dense.train(2, 2, ["--spectral-tp-mode", "blockwise"])
    apart = max(
        abs(got - wanted) / wanted for got, wanted in zip(run.losses, dense.reference.losses, strict=True)
    )
    assert apart > 1e-3, "if this were equal, the documentation's warning would be wrong"
    assert run.losses[-1] < 0.99 * run.losses[0]
