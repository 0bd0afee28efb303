"""``sso-megatron plan`` against real runs, parameter by parameter, and against counts by hand."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.browser import Browser
from helpers.megatron_runs import MOE, Megatron, Run, tiny
from helpers.processes import HANGS_AFTER
from helpers.runs.plans import assert_same_loads, read
from sso_megatron.cli.plan.speed import Speed
from sso_megatron.mcore.plan.records import Load, Plan, RankLoad

SP = "--sequence-parallel"
DIST = "--use-distributed-optimizer"
ETP = "--expert-tensor-parallel-size"
EP2 = ["--expert-model-parallel-size", 2]
PP2 = ["--pipeline-model-parallel-size", 2]
MLA = shlex.split(
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 32 --qk-head-dim 16 --v-head-dim 24 "
    "--qk-pos-emb-head-dim 8"
)
VPP = [*PP2, "--num-layers", 4, "--num-layers-per-virtual-pipeline-stage", 1]
SCALE = ["--sso-scale-mode"]
# So far below the singular values of AdamW's direction that the largest ends at c.
CLIP = ["--spectra-clip-c", 0.1, "--spectra-clip-weight-decay", 0]

# Ranks, tensor-parallel size, optimizer, flags. The model has two query groups: TP 4 cuts them.
LAYOUTS: dict[str, tuple[int, int, str, list[object]]] = {
    "tp4": (4, 4, "sso", []),
    "tp2 distributed": (2, 2, "sso", ["--spectral-tp-mode", "distributed", *SCALE, "align_adam_rms"]),
    "tp2 blockwise": (2, 2, "muon_sphere", ["--spectral-tp-mode", "blockwise", *SCALE, "spectral_kaiming"]),
    "pp2-vpp2, a pattern of one stage": (2, 1, "sso", [*VPP, "--spectral-exclude", r"layers\.3\..*fc2"]),
    "dp2": (2, 1, "sso", ["--bf16"]),
    "ep2-dp2-dist": (4, 1, "sso", [*MOE, "--micro-batch-size", 1, *EP2, DIST, "--bf16"]),
    "tp2-ep2-etp2": (4, 2, "sso", [*MOE, SP, *EP2, ETP, 2]),
    "tp2-etp1-dist": (2, 2, "sso", [*MOE, SP, ETP, 1, DIST]),
    "tp2-dp2-dist": (4, 2, "sso", ["--num-layers", 3, DIST]),
    "tp2, latent attention": (2, 2, "sso", [*MLA, SP]),
    "tp2, thin products": (2, 2, "spectra", []),
    "tp2, everything": (2, 2, "spectra_clip_adamw", CLIP),
    "tied": (2, 1, "spectral_adam", PP2),
}


def plan(megatron: Megatron, argv: list[str], *options: object, fails: bool = False) -> Run:
    own = [*map(str, options), "--json", "plan.json"]
    return megatron.run([*own, *argv], main="probes.plan:plan", fails=fails)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_is_what_the_run_does(megatron: Megatron, layout: str) -> None:
    ranks, tp, optimizer, flags = LAYOUTS[layout]
    argv = tiny(*flags, "--train-iters", 2, "--lr-warmup-iters", 0, tp=tp, optimizer=optimizer)
    if "--multi-latent-attention" in argv:
        argv.remove("--group-query-attention")
    if layout == "tied":
        argv.remove("--untie-embeddings-and-output-weights")
    planned = read(plan(megatron, argv, "--world-size", ranks))
    real = megatron.run(argv, ranks, calls=("probes.plan:watch",))
    assert_same_parameters(planned, real)
    assert_same_matrices(planned, real)
    assert_same_loads(planned, real)


def assert_same_parameters(planned: dict[str, Any], real: Run) -> None:
    """Names, shapes, routes, the data-parallel rank that steps on each; elements, copies left out."""
    shapes, steppers, elements = {}, {}, {}
    for place, found in zip(real.saved("place"), real.saved("parameters"), strict=True):
        for name, parameter in found.items():
            shapes[name, place["stage"]] = list(parameter["stored"])
            elements[parameter["content"]] = parameter["numel"]
            data = place["expert_data" if parameter["is_expert"] else "data"]
            if parameter["steps"]:
                steppers.setdefault((name, place["stage"]), set()).add(data)
    assert {(p["name"], p["stage"]): p["stored"] for p in planned["parameters"]} == shapes
    assert planned["totals"]["parameters"] == sum(elements.values())
    route = planned["optimizer"]
    routes = {(p["name"], p["stage"]): p["route"] for p in planned["parameters"]}
    assert routes == {key: route if key in steppers else "adamw" for key in shapes}
    for p in planned["parameters"]:
        if p["dp_owner"] is not None:
            assert steppers[p["name"], p["stage"]] == {p["dp_owner"]}, p["name"]
        elif p["route"] != "adamw":
            assert not planned["is_sharded"]


def assert_same_matrices(planned: dict[str, Any], real: Run) -> None:
    """Names, shapes, modes, radii, and the tensor-parallel ranks that work on each."""
    wanted: dict[str, Any] = {}
    for place, found in zip(real.saved("place"), real.saved("matrices"), strict=True):
        for name, m in found.items():
            where = "expert_tensor" if ".experts." in name else "tensor"
            known = wanted.setdefault(name, {"shape": list(m["shape"]), "mode": m["mode"], "ranks": set()})
            assert (known["shape"], known["mode"]) == (list(m["shape"]), m["mode"])
            if m["works"]:
                known["ranks"].add(place[where])
                known["radius"] = m["radius"]
    found = {m["name"]: m for p in planned["parameters"] for m in p["matrices"]}
    assert found.keys() == wanted.keys()
    for name, m in found.items():
        mode = "local" if m["tp_mode"] == "blockwise" else m["tp_mode"]  # a shard is a matrix of its own
        assert (m["shape"], mode) == (wanted[name]["shape"], wanted[name]["mode"]), name
        if m["tp_rank"] is not None:
            assert wanted[name]["ranks"] == {m["tp_rank"]}, name
        else:
            size = planned["parallel"]["expert_tensor" if ".experts." in name else "tensor"]
            assert wanted[name]["ranks"] == set(range(size)), name
        radius = wanted[name]["radius"]
        assert m["radius"] == (radius and pytest.approx(radius)), name
    assert_same_scales(planned, found, real.merged("moves"))


def assert_same_scales(planned: dict[str, Any], found: dict[str, Any], moves: dict[str, float]) -> None:
    """Spectral norms of steps by the learning rate, where the direction's is known: 1, or c if clipped.

    Newton-Schulz brings the largest singular value to 1 within 1e-3.
    """
    if planned["optimizer"] not in ("sso", "muon_sphere", "spectra_clip_adamw"):
        assert all(m["scale"] is None for m in found.values())
        return
    norm = planned["settings"].get("c", 1)
    for name, m in found.items():
        assert m["scale"] * norm == pytest.approx(moves[name], rel=1e-3), name


# ---------------------------------------------------------------- the paper's models

# Its files are not here: as many tokens as OLMo-2's tokenizer has.
NO_FILES = "--tokenizer-type NullTokenizer --vocab-size 100278"


def plan_experiment(megatron: Megatron, name: str, flags: str, *options: object) -> Run:
    argv = [name, *map(str, options), "--json", "plan.json", *shlex.split(f"{NO_FILES} {flags}")]
    return megatron.run(argv, main="probes.plan:plan_experiment")


def hand_count(
    layers: int, hidden: int, ffn: int, heads: int, moe: bool = False
) -> tuple[int, dict[str, int]]:
    """Parameters without embeddings, and matrices by kind."""
    attention = hidden * 128 * (heads + heads // 2 * 2 + heads)
    norms = layers * (2 * hidden + 2 * 128) + hidden
    kinds = {"q": layers * heads, "k": layers * heads // 2, "v": layers * heads // 2, "proj": layers}
    if not moe:
        kinds |= dict.fromkeys(("gate", "up", "down"), layers)
        return layers * (attention + 3 * hidden * ffn) + norms, kinds
    kinds |= dict.fromkeys(("gate", "up", "down"), 1) | {"router": layers - 1, "gate_weight": layers - 1}
    kinds |= {f"expert {kind}": 64 * (layers - 1) for kind in ("gate", "up", "down")}
    kinds |= {f"shared {kind}": layers - 1 for kind in ("gate", "up", "down")}
    experts = 65 * 3 * hidden * 768 + (64 + 1) * hidden  # the router, and the shared expert's gate
    return layers * attention + 3 * hidden * ffn + (layers - 1) * experts + norms, kinds


MODELS: dict[str, tuple[tuple[int, int, int, int], float]] = {
    "dense_1.7b": ((28, 2048, 6144, 16), 1.409e9),
    "moe_8b_a1b": ((27, 2048, 4096, 16), 8.34e9),
    "deepnet_200": ((200, 512, 1536, 8), 0.786e9),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_papers_models_are_what_a_hand_counts(megatron: Megatron, model: str) -> None:
    sizes, published = MODELS[model]
    planned = read(plan_experiment(megatron, f"{model}_sso", ""))
    totals = planned["totals"]
    number, kinds = hand_count(*sizes, moe=model.startswith("moe"))
    assert totals["parameters_without_embeddings"] == number
    assert totals["parameters_without_embeddings"] == pytest.approx(published, rel=1e-3)
    assert totals["parameters"] == number + 2 * sizes[1] * 100352  # rows padded to a multiple of 128
    assert totals["matrices"] == kinds
    matrices = [m for p in planned["parameters"] for m in p["matrices"]]
    assert Counter(m["kind"] for m in matrices) == kinds
    if model.startswith("moe"):
        experts = sum(math.prod(m["shape"]) for m in matrices if m["kind"].startswith("expert "))
        assert number - experts * 60 / 64 == pytest.approx(0.98e9, rel=5e-3), "active, 4 of 64 experts"


SIZES = {
    "llama_160m_adamw_wsd": 160e6,
    "llama_780m_adamw": 780e6,
    "llama_820m_adamw": 820e6,
    "qwen_134m_spectral_adam": 134e6,
}


@pytest.mark.parametrize("name", SIZES)
def test_shapes_that_are_not_published_in_full_have_the_published_size(
    megatron: Megatron, name: str
) -> None:
    planned = read(plan_experiment(megatron, name, "--vocab-size 50257"))
    assert planned["totals"]["parameters"] == pytest.approx(SIZES[name], rel=0.02)


def test_a_trillion_parameters_take_little_memory(megatron: Megatron) -> None:
    model = """
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 64
    --num-query-groups 64 --num-experts 384 --moe-router-topk 8 --moe-ffn-hidden-size 2048
    --global-batch-size 2048 --moe-shared-expert-intermediate-size 2048 --moe-layer-freq ([0]+[1]*60)
    --moe-token-dispatcher-type flex --moe-shared-expert-overlap false --fp8-format hybrid
    --tensor-model-parallel-size 8 --sequence-parallel --expert-model-parallel-size 128
    --expert-tensor-parallel-size 1
    """
    run = plan_experiment(megatron, "moe_8b_a1b_sso", model, "--world-size", 2048)
    planned = read(run)
    assert planned["totals"]["parameters"] > 1e12
    assert planned["totals"]["matrices"]["expert gate"] == 60 * 384
    (peak,) = run.saved("peak")
    assert peak < 2048, "MiB"
    assert any(
        "--fp8-format" in note and "--moe-token-dispatcher-type" in note for note in planned["notes"]
    )


# ---------------------------------------------------------------- warnings


def warned(megatron: Megatron, *flags: object, tp: int = 1, optimizer: str = "sso", ranks: int = 0) -> str:
    world = ["--world-size", ranks] if ranks else []
    run = plan(megatron, tiny(*flags, tp=tp, optimizer=optimizer), *world)
    return "\n".join(read(run)["warnings"])


def test_a_plan_without_a_reason_has_no_warning(megatron: Megatron) -> None:
    assert warned(megatron, "--spectral-mup-init", "--lr", 5e-3) == ""


def test_warnings_name_the_flag_and_the_way_out(megatron: Megatron) -> None:
    text = warned(
        megatron,
        *("--lr", 0.5, "--sso-weight-decay", 0.1, "--spectral-workspace-mib", 1, "--ffn-hidden-size", 8192),
        *("--num-query-groups", 1),
        tp=4,
        ranks=8,
    )
    for flag in (
        "--lr 0.5 is far outside",
        "arXiv 2601.08393",
        "--sso-weight-decay 0.1 has no effect",
        "--tensor-model-parallel-size 4 cuts heads",
        "--num-query-groups",
        "--spectral-mup-init",
        "--spectral-workspace-mib 1",
        "--use-distributed-optimizer shares",
    ):
        assert flag in text, flag
    text = warned(
        megatron, "--lr", 0.5, "--sso-scale-mode", "align_adam_rms", tp=2, optimizer="muon_sphere"
    )
    assert "--lr" not in text, "the published rates are those of another scale"
    text = warned(megatron, "--spectral-tp-mode", "blockwise", tp=2)
    assert "--spectral-tp-mode blockwise" in text
    # Four data-parallel ranks and four weights of unlike sizes.
    text = warned(megatron, "--num-layers", 1, "--micro-batch-size", 1, DIST, ranks=4)
    assert "times the mean work" in text


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer", "adam"], "--optimizer adam: nothing is spectral"),
        (["--sso-momentum", 2], "--sso-momentum 2.0 must lie in [0, 1)"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--optimizer", "ssso"], "argument --optimizer: invalid choice: 'ssso'"),
        (["--spectral-exclude", "nothing"], "--spectral-exclude 'nothing' matches no matrix"),
        (["--fp16"], "--fp16 with --optimizer sso: float16 gradients overflow"),
        (["--world-size", 3, "--tensor-model-parallel-size", 2], "--world-size 3 must be a multiple of 2"),
        (["--flops", -1], "--flops and --bandwidth must be positive"),
        (["--num-query-groups", 3], "160 rows on each of 1 ranks are no whole number of groups"),
        (["--flops", "inf"], "must be positive and finite"),
        (["--flops", "nan"], "must be positive and finite"),
        (["--json", "same", "--html", "./same"], "both name same"),
        (["--html", "."], ". is a folder"),
        (["--num-layers", 0], "--num-layers 0 must be at least 1"),
        (["--tensor-model-parallel-size", 0], "--tensor-model-parallel-size 0 must be at least 1"),
        (["--num-attention-heads", 0], "ZeroDivisionError at "),
        (["--checkpoint-activations"], "--checkpoint-activations is no longer valid"),
        (["--spectral-exclude", "("], "must be regular expressions; '(' has missing )"),
        (["--spectral-exclude", "nothing", "--num-layers", 9], " and 33 more"),
        (["--save", "ck"], "AssertionError at assert args.save_interval is not None"),
        (["--log-spectral-metrics", 5], "--log-spectral-metrics 5 has nowhere to write"),
        (["--log-spectral-criterion", 5], "--log-spectral-criterion 5 is written into a folder"),
        (["--spectral-health", "stop"], "--spectral-health stop goes by what is measured"),
        (["--sft"], "--sft: this script trains on plain token streams"),
        (["--hybrid-layer-pattern", "M*"], "Mamba layers need GPU kernels, which a plan cannot build"),
    ],
)
def test_errors_are_one_line(megatron: Megatron, flags: list[object], said: str) -> None:
    run = plan(megatron, tiny(*flags), fails=True)
    assert run.codes == [2]
    (line,) = [line for line in run.log.splitlines() if line.strip()]
    assert line.startswith("sso-megatron plan: error: ") and said in line


def test_a_plan_that_fails_makes_no_folder(megatron: Megatron) -> None:
    run = plan(megatron, tiny("--num-layers", 0), "--html", "pages/plan.html", fails=True)
    assert run.codes == [2] and not (run.folder / "pages").exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_checkpoint_is_not_read(megatron: Megatron, tmp_path: Path, is_there: bool) -> None:
    """Scripts have --load from the first run on, when the folder is empty."""
    if is_there:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    planned = read(plan(megatron, tiny("--load", tmp_path)))
    norms = [m["initial_norm"] for p in planned["parameters"] for m in p["matrices"]]
    assert norms and all((norm is None) == is_there for norm in norms)
    assert any("holds no checkpoint here" in note for note in planned["notes"]) != is_there
    said = "--weight-decay 0.1 reaches AdamW's parameters only; matrices have --sso-weight-decay (0)"
    assert said in planned["notes"]


def test_the_balance_is_that_of_the_busiest_ranks_group() -> None:
    flops = {(0, 0): 5.0, (0, 1): 1.0, (1, 0): 3.0, (1, 1): 4.0}  # by stage and data-parallel rank
    ranks = [RankLoad(stage, 0, data, 0, data, Load(flops=f)) for (stage, data), f in flops.items()]
    made = Plan("sso", 4, {}, {}, {}, [], [], ranks, (0, 0), 0, True, 0.0, 0)
    assert made.flops_by_data_rank() == [5, 1] and made.imbalance() == pytest.approx(5 / 3)


def test_seconds_of_an_iteration() -> None:
    """Each of four ranks has a quarter of the model's 80 flops; the second takes longest for its step."""
    loads = [Load(flops=8.0, received=10), Load(flops=2.0, received=40), Load(flops=6.0)]
    ranks = [RankLoad(0, 0, data, 0, data, load) for data, load in enumerate([*loads, Load()])]
    made = Plan("sso", 4, {}, {}, {}, [], [], ranks, (0, 0), 0, True, 80.0, 0)
    speed = Speed.of([10.0, 2.0], 5.0)
    assert speed is not None
    assert speed.seconds(made) == (2.0, 9.0) and speed.share(made) == pytest.approx(9 / 11)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """As a user types it: standard output has the tables alone, and files stand where they should."""
    argv = tiny("--num-layers", 4, *PP2, DIST, "--bf16", tp=2)
    own = "--world-size 8 --html pages/plan.html --json plan.json --flops 400e12 60e12 --bandwidth 300e9"
    result = subprocess.run(
        [sys.executable, "-m", "sso_megatron.cli.main", "plan", *shlex.split(own), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "RANK": "1"},
        timeout=HANGS_AFTER,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stderr == ""
    first, *lines = result.stdout.splitlines()
    assert first.strip() == "--optimizer sso"
    (row,) = [line.split() for line in lines if "linear_fc2" in line]
    assert row[0] == "decoder.layers.0-3.mlp.linear_fc2.weight" and "owner" in row
    planned = json.loads((tmp_path / "plan.json").read_text())
    loads = [rank["load"] for rank in planned["ranks"]]
    model = planned["model_flops"] / 8 / 400e12
    step = max(load["flops"] / 60e12 + load["received"] / 300e9 for load in loads)
    assert planned["world_size"] == 8 and planned["share"] == pytest.approx(step / (model + step))
    page = (tmp_path / "pages" / "plan.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")  # names of SVG's parts
    assert "decoder.layers.0-3.mlp.linear_fc2.weight" in page
    for warning in planned["warnings"]:
        assert warning.split(";")[0][:40].replace("'", "&#39;") in page


def test_the_page_in_a_browser(megatron: Megatron, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    argv = tiny(*MOE, SP, *EP2, ETP, 1, DIST, tp=2)
    plan(megatron, argv, "--world-size", 4, "--html", page)
    shown = browser.open(page)
    assert shown.messages == [] and shown.requests == []
    assert "decoder.layers.1.mlp.router.weight" in shown.text and "expert gate" in shown.text
    picture = np.asarray(browser.screenshot(page, tmp_path / "page.png").convert("L"))
    assert picture.std() > 10, "something is drawn"
