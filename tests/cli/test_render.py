"""``sso-megatron render`` on configurations made here: what comes out, and one line for each mistake."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import sso_megatron
from helpers.megatron_runs import Megatron
from helpers.processes import HANGS_AFTER
from sso_megatron.cli.experiments import fragments as experiments

FILES = {
    "model/small": "--num-layers: 2 # ours\n--bf16: true\n--hidden-size: 64\n",
    "model/other": "--num-layers: 3\n",
    "model/same": "--num-layers: 2\n--swiglu: true\n",
    "model/list": "- --num-layers\n",
    "model/twice": "--lr: 1\n--bf16: true\n--lr: 1\n",
    "model/bare": "num-layers: 2\n",
    "model/blank": "--num-layers:\n",
    "model/nested": "--num-layers: {a: 1}\n",
    "model/fused": "--yarn-correction-range-round-to-int: true\n",
    "experiments/base": """
        about: two layers
        fragments: [model/small, model/same]
        flags: {--lr: 1e-3, --bf16: false, --moe-aux-loss-coeff: [1e-2, 0.001], --optimizer: sso}
        sweep: {--lr: [1e-3, 3e-3], --spectral-exclude: [[a, b/c], [d]], --sso-nesterov: [true, false]}
    """,
    "experiments/plain": "about: no [b]sweep\nfragments: [model/small]\n",
}


BASE = "--num-layers 2 --hidden-size 64 --swiglu --lr 1e-3 --moe-aux-loss-coeff 1e-2 0.001 --optimizer sso"
WORDS = {
    "base": BASE,
    "base --lr 5e-3 --hidden-size=32": BASE.replace("1e-3", "5e-3").replace("64", "32"),
    "base --bf16": f"{BASE} --bf16",
    "base --swiglu false --moe-aux-loss-coeff 1": BASE.replace("--swiglu ", "").replace("1e-2 0.001", "1"),
    "base --data-path 0.3 'a b' --seed -1": f"{BASE} --data-path 0.3 'a b' --seed -1",
    "base --tokenizer-model=-x": f"{BASE} --tokenizer-model=-x",
    "base --no-sso-nesterov --sso-nesterov": f"{BASE} --sso-nesterov",
    "base --lr 1 --lr 2": BASE.replace("1e-3", "2"),
    "--point 5 base": BASE.replace("1e-3", "3e-3") + " --spectral-exclude a b/c",
    "plain": "--num-layers 2 --bf16 --hidden-size 64",
}
"""Arguments, and the words that they give."""

NAMES = {
    "--points plain": [],
    "--name base": ["base"],
    "--name base --point 3": ["base/lr=1e-3,spectral-exclude=d,sso-nesterov=false"],
    "--name {configs}/experiments/plain.yaml": ["plain"],
    "plain --data-path 0.3 'a b' '$HOME'": [
        "--num-layers 2 \\",
        "--bf16 \\",
        "--hidden-size 64 \\",
        "--data-path 0.3 'a b' '$HOME'",
    ],
}
"""Arguments, and the lines that they give."""

MISTAKES = {
    "about: a\nfragmets: []": "x.yaml: fragmets: not a part of an experiment, which has about, fragments",
    "fragments: []": "x.yaml: about: say in one line what",
    "about: a\nfragments: model/small": "x.yaml: fragments: must be a list of names such as model",
    "about: a\nfragments: [model/smal]": "model/smal: no such file in {configs}; did you mean model/small?",
    "about: a\nfragments: [experiments/plain]": "x.yaml: fragments: experiments/plain: no such file",
    "about: a\nfragments: [model/small, model/other]": "x.yaml: --num-layers is 2 in "
    "{configs}/model/small.yaml and 3 in {configs}/model/other.yaml; take",
    "about: a\nfragments: [model/list]": "model/list.yaml: must be a mapping of keys to values",
    "about: a\nfragments: [model/twice]": "model/twice.yaml: line 3: --lr stands there twice",
    "about: a\nfragments: [model/bare]": "bare.yaml: num-layers: write flags as Megatron has them, --num-l",
    "about: a\nfragments: [model/blank]": "blank.yaml: --num-layers: has no value; write one, or true for",
    "about: a\nfragments: [model/nested]": "nested.yaml: --num-layers: must be one value or a list",
    "about: a\nflags: 3": "x.yaml: must map flags to values",
    "about: a\nflags: {--lr: []}": "x.yaml: --lr: has no value",
    "about: a\nsweep: [--lr]": "x.yaml: sweep: must map flags to lists",
    "about: a\nsweep: {--lr: 1}": "x.yaml: sweep: --lr: must be a list of values",
    "about: a\nsweep: {--lr: []}": "x.yaml: sweep: --lr: must be a list of values",
    "about: a\nsweep: {lr: [1]}": "x.yaml: lr: write flags as Megatron has them, --lr",
    "about: a\nsweep: {--lr: [1, 1]}": "x.yaml: sweep: two points would have the name lr=1",
    "about: a: b": "x.yaml: line 1: mapping values are not allowed here",
    "? [a]\n: b": "x.yaml: line 1: a key is no word",
    "# nothing": "x.yaml: must be a mapping",
    "about: a\nflags: {--num_layers: 1}": "--num_layers: no flag of Megatron's or ours; did you mean --num",
    "about: a\nflags: {--num-layers: 1.5}": "x.yaml: argument --num-layers: invalid int value: '1.5'",
    "about: a\nflags: {--optimizer: ssso}": "x.yaml: argument --optimizer: invalid choice: 'ssso'",
    "about: a\nflags: {--lr: [1, 2]}": "x.yaml: --lr 1 2: takes fewer values",
    "about: a\nflags: {--rampup-batch-size: [1, 2]}": "argument --rampup-batch-size: expected 3 arguments",
    "about: a\nflags: {--bf16: yes}": "x.yaml: --bf16 yes: is a switch; give true or false",
    "about: a\nflags: {--save: false}": "x.yaml: --save false: takes a value and is no switch",
    "about: a\nfragments: [model/fused]\nflags: {--no-yarn-correction-range-round-to-int: true}": "x.yaml: "
    "--no-yarn-correction-range-round-to-int sets the same as --yarn-correction-range-round-to-int in",
}
"""Files, and what is said of them."""

ASKED = {
    "--point 0": ("", "--point 0: x has no sweep; leave it out"),
    "--point 2": ("[1, 2]", "--point 2: x has the points 0 to 1"),
    "--point -1": ("[1, 2]", "--point -1: x has the points 0 to 1"),
    "--point 0 --lr 3": ("[1]", "--lr with --point 0: the point sets it; leave one of them out"),
    "--point 1": ("[1, x]", "x.yaml: argument --lr: invalid float value: 'x'"),
    "--xyzzyx 3": (
        "",
        "--xyzzyx: no flag of Megatron's or ours; python -m sso_megatron.pretrain_gpt --help",
    ),
    "--lr": ("", "argument --lr: expected one argument"),
    "y --lr 1": ("", "y: stands before the first flag"),
    "--swiglu 1": ("", "--swiglu 1: is a switch; give true or false"),
}
"""Arguments for an experiment with this sweep of --lr, and what is said of them."""

UNKNOWN = {
    "bas": "bas: no such experiment; did you mean base? --list shows all",
    "no/such.yaml": "no/such.yaml: no such experiment; name a file",
    "": "name an experiment first, then its flags",
    "--lr 1 base": "name an experiment first, then its flags",
    "--configs no/such base": "--configs no/such: has no folder experiments",
    "{configs}/bytes.yaml": "bytes.yaml: is no YAML",
    # Were one of its own flags Megatron's, it could not be given to a run.
    **{
        f"{{configs}}/own{flag}.yaml": f"{flag}: no flag of Megatron's or ours"
        for flag in ("--point", "--null", "--configs", "--list", "--points", "--name")
    },
}


class Answer(NamedTuple):
    code: int
    printed: str
    said: str


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for name in UNKNOWN:
        if "own--" in name:
            flag = name.removeprefix("{configs}/own").removesuffix(".yaml")
            Path(name.format(configs=folder)).write_text(f"about: a\nflags: {{{flag}: 1}}")
    return folder


@pytest.fixture(scope="module")
def answers(megatron: Megatron, configs: Path) -> dict[str, Answer]:
    """By what is given to the command; all in one process, since each takes a second to start."""
    lines = {f"--null {argv}": f"--null {argv}" for argv in WORDS}
    lines |= {argv: argv for argv in (*NAMES, *UNKNOWN, "--points base", "--list")}
    files = {text: (text, "") for text in MISTAKES}
    files |= {
        argv: (f"about: a\nsweep: {{--lr: {v}}}" if v else "about: a", argv)
        for argv, (v, _) in ASKED.items()
    }
    for number, (key, (text, argv)) in enumerate(files.items()):
        path = configs / str(number) / "x.yaml"
        path.parent.mkdir()
        path.write_text(text)
        lines[key] = f"{path} {argv}"
    words = [shlex.split(line.format(configs=configs)) for line in lines.values()]
    words = [line if "--configs" in line else ["--configs", str(configs), *line] for line in words]
    (configs / "lines.json").write_text(json.dumps(words))
    run = megatron.run([str(configs / "lines.json")], main="probes.config:render")
    found = [Answer(*answer) for answer in json.loads((run.folder / "answers.json").read_text())]
    return dict(zip(lines, found, strict=True))


@pytest.mark.parametrize("argv", WORDS)
def test_words(answers: dict[str, Answer], argv: str) -> None:
    answer = answers[f"--null {argv}"]
    assert answer.code == 0 and answer.printed.endswith("\0")
    assert answer.printed[:-1].split("\0") == shlex.split(WORDS[argv])
    assert ("which is left out" in answer.said) == ("base" in argv and "--point" not in argv)


@pytest.mark.parametrize("argv", NAMES)
def test_names_and_lines(answers: dict[str, Answer], argv: str) -> None:
    assert answers[argv] == (0, "".join(f"{line}\n" for line in NAMES[argv]), "")


def test_points_and_list(answers: dict[str, Answer]) -> None:
    names = answers["--points base"].printed.splitlines()
    assert len(names) == 8 and names[0] == "0\tlr=1e-3,spectral-exclude=a+b_c,sso-nesterov=true"
    assert names[3] == "3\tlr=1e-3,spectral-exclude=d,sso-nesterov=false"
    listed = answers["--list"].printed.splitlines()
    assert [line.split() for line in listed[1:]] == [
        ["base", "two", "layers", "8"],
        ["plain", "no", "[b]sweep"],
    ]


SAID = MISTAKES | {argv: said for argv, (_, said) in ASKED.items()} | UNKNOWN


@pytest.mark.parametrize("text", SAID)
def test_mistakes_are_one_line(answers: dict[str, Answer], configs: Path, text: str) -> None:
    code, printed, said = answers[text]
    assert (code, printed) == (2, "")
    (line,) = said.splitlines()
    assert line.startswith("sso-megatron render: error: ") and SAID[text].format(configs=configs) in line


def test_an_installed_package_needs_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sso_megatron, "__file__", str(tmp_path / "sso_megatron" / "__init__.py"))
    with pytest.raises(ValueError, match="no configs/ beside this installed package; name the one of a"):
        experiments.configs_folder(None)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """As a script calls it, in a job with ranks of its own: words alone on standard output."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "sso_megatron.cli.main",
            "render",
            "--null",
            "tiny_dense_sso",
            "--seed",
            "7",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"},
        timeout=HANGS_AFTER,
    )
    assert (result.returncode, result.stderr) == (0, "")
    words = result.stdout.split("\0")
    assert words[-1] == "" and words[words.index("--seed") + 1] == "7" and "sso" in words
    assert list(tmp_path.iterdir()) == []


def test_without_what_megatron_trains_with_it_is_one_line() -> None:
    """As where megatron-core is installed without its extra ``training``."""
    code = "import sys; sys.modules['megatron.training'] = None; from sso_megatron.cli.main import main; "
    code += "sys.exit(main(['render', 'tiny_dense_sso']))"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("sso-megatron render: error: No module named 'megatron.training")


@pytest.mark.parametrize("words", [["--list"], ["tiny_dense_sso"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(words: list[str]) -> None:
    """Behind a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sso_megatron.cli.main", "render", *words]
    ended = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=HANGS_AFTER, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")
