"""What a rank of the zygote runs for ``test_configs.py`` and ``test_render.py``."""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

WORLD_SIZES = {
    "parallel/node": 8,
    "parallel/ep8": 8,
    "parallel/pp8": 8,
    "parallel/one": 1,
    "parallel/cpu": 1,
}
"""Ranks of a run with this fragment."""


def render() -> None:
    """The command with each list of arguments of a file; ``answers.json`` gets code, output and errors."""
    from sso_megatron.cli.main import main

    answers = []
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        printed, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            code = main(["render", *argv])
        answers.append((code, printed.getvalue(), said.getvalue()))
    Path("answers.json").write_text(json.dumps(answers))


def render_all() -> None:
    """Write ``rendered.json``: the words of all experiments, and of the ends of their sweeps, by name."""
    from sso_megatron.cli.experiments import fragments as experiments
    from sso_megatron.cli.experiments.command import render

    found = {}
    for name in experiments.names(experiments.configs_folder(None)):
        experiment = experiments.read(name)
        points = experiment.points()
        for index in {0, len(points) - 1} if points else [None]:
            point = "" if index is None else "/" + experiments.point_name(points[index])
            found[name + point] = [word for line in render(experiment, index, []) for word in line]
    Path("rendered.json").write_text(json.dumps(found))


def validate_all() -> None:
    """Validate each command line of a file as its run would, in a process of its own; ends at an error."""
    from sso_megatron.mcore.flags.megatron_parser import FlagParser

    FlagParser()
    for name, (world_size, words) in json.loads(Path(sys.argv[1]).read_text()).items():
        print("validating", name, flush=True)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _validate(world_size, words)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, name


def _validate(world_size: int, words: list[str]) -> None:
    """As ``pretrain_gpt`` does on a machine with GPUs, but for kernels that only these have."""
    from megatron.training import arguments

    from sso_megatron.cli.train import pretrain_gpt
    from sso_megatron.mcore.rehearsal import rehearsal

    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = ["pretrain_gpt.py", *words]
    args = arguments.parse_args()
    left_out = rehearsal.leave_out_refused(args)
    print("without", left_out, flush=True)
    arguments.validate_args(args, dict(pretrain_gpt.DEFAULTS))
    pretrain_gpt.refuse_packed_data(args)
    assert args.world_size == world_size
