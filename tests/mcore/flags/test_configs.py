"""``configs/``: every experiment renders and is a valid run, and the small ones train."""

import json
import re
from pathlib import Path

import pytest

from helpers.megatron_runs import Megatron
from helpers.probes.config import WORLD_SIZES
from sso_megatron.cli.experiments import fragments as experiments
from sso_megatron.mcore.flags.optimizers import config_classes, flag_fields, flags_of

CONFIGS_FOLDER = experiments.configs_folder(None)
NAMES = experiments.names(CONFIGS_FOLDER)
TINY = [name for name in NAMES if name.startswith("tiny_")]
# Flags that nothing reads without another one.
NEEDED = {
    "--muon-": ("--optimizer", "muon"),
    "--lr-wsd-": ("--lr-decay-style", "WSD"),
    "--moe-": ("--num-experts", None),
    "--expert-": ("--num-experts", None),
    "--moe-z-loss-coeff": ("--moe-router-load-balancing-type", "global_aux_loss"),
    "--moe-router-bias-update-rate": ("--moe-router-enable-expert-bias", None),
    "--num-query-groups": ("--group-query-attention", None),
    "--rotary-base": ("--position-embedding-type", "rope"),
    "--vocab-size": ("--tokenizer-type", "NullTokenizer"),
}


@pytest.fixture(scope="module")
def rendered(megatron: Megatron) -> dict[str, list[str]]:
    """Words of every experiment, and of the first and last point of every sweep."""
    run = megatron.run([], main="probes.config:render_all")
    found = json.loads((run.folder / "rendered.json").read_text())
    assert {name.split("/")[0] for name in found} == set(NAMES)
    return found


def world_size(name: str) -> int:
    (size,) = {WORLD_SIZES[f] for f in fragments(name.split("/")[0]) if f.startswith("parallel/")}
    return size


def fragments(name: str) -> list[str]:
    text = (CONFIGS_FOLDER / "experiments" / f"{name}.yaml").read_text()
    return re.findall(r"(?:model|optimizer|training|data|parallel)/[\w.]+", text)


# ---------------------------------------------------------------- the files


def test_every_rendered_experiment_is_a_valid_run(
    megatron: Megatron, rendered: dict[str, list[str]], tmp_path: Path
) -> None:
    lines = {name: (world_size(name), words) for name, words in rendered.items()}
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    run = megatron.run([str(tmp_path / "lines.json")], main="probes.config:validate_all")
    assert run.log.count("validating ") == len(lines)
    assert run.log.count("without []") == len(lines), "this machine left flags out"
    assert "not read, since" not in run.log


def test_no_flag_is_idle(rendered: dict[str, list[str]]) -> None:
    """Ours are refused by the run itself; here are Megatron's."""
    for name, words in rendered.items():
        for prefix, (flag, value) in NEEDED.items():
            given = [word for word in words if word.startswith(prefix)]
            if given:
                assert flag in words, f"{name}: {given[0]} needs {flag}"
                assert value in (None, words[words.index(flag) + 1]), (
                    f"{name}: {given[0]} needs {flag} {value}"
                )


def test_every_fragment_is_used() -> None:
    there = {str(p.relative_to(CONFIGS_FOLDER).with_suffix("")) for p in CONFIGS_FOLDER.glob("*/*.yaml")}
    there -= {f"experiments/{name}" for name in NAMES}
    assert there == {fragment for name in NAMES for fragment in fragments(name)}


def test_no_default_of_ours_is_repeated() -> None:
    defaults = {flags_of(p, [f.name]): f.default for p in config_classes() for f in flag_fields(p)}
    for name in NAMES:
        ours = {flag: given for flag, given in experiments.read(name).flags.items() if flag in defaults}
        for flag, given in ours.items():
            default = defaults[flag]
            is_number = isinstance(default, int | float) and not isinstance(default, bool)
            written = float(given.value) if is_number else given.value
            shown = default if is_number else str(default).lower()
            assert written != shown, f"{given.path}: {flag} is the default"


def test_the_readme_has_all_experiments() -> None:
    rows = [f"| `{name}` | {experiments.read(name).about} |" for name in NAMES]
    text = (CONFIGS_FOLDER / "README.md").read_text()
    found = [line for line in text.splitlines() if line.startswith("| `")]
    assert found == rows, "write this into configs/README.md:\n" + "\n".join(rows)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", TINY)
def test_the_small_ones_train(megatron: Megatron, rendered: dict[str, list[str]], name: str) -> None:
    run = megatron.train(rendered[name])
    losses = run.losses
    assert len(losses) == 20 and run.summary["iterations"] == 20
    print(f"{losses[0]:.3f} {losses[-1]:.3f} {run.summary['val_loss']:.3f}")
    assert losses[-1] < 0.7 * losses[0]
    if name == "tiny_dense_sso":
        for flags in (["--tensor-model-parallel-size", "2"], []):
            other = megatron.train([*rendered[name], *flags], ranks=2)
            assert other.losses == pytest.approx(losses, rel=1e-4)
