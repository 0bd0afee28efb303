"""Commands and parsers as a rank runs them, where Megatron is imported already."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from helpers import probes
from helpers.pages import blocks
from sso_megatron.cli.main import main
from sso_megatron.mcore.offline import singular_values
from sso_megatron.mcore.offline.export import stored_radii


def command() -> None:
    """``sso-megatron`` with this rank's arguments."""
    sys.exit(main())


def read_singular_values() -> None:
    """What a rank does, where Megatron is imported already: singular values into a file."""
    found = singular_values.read(Path(sys.argv[1]), re.compile(sys.argv[2]))
    torch.save(found, "values.pt")


def save_radii() -> None:
    """Save what an optimizer with radii of its own saves, as Megatron does."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    torch.distributed.init_process_group("gloo")
    states = {
        "a.weight[q0]": {"radius": torch.tensor(2.5), "lam": torch.zeros(())},
        "b.weight": {"lam": torch.zeros(())},
    }
    objects = {
        name: ShardedObject(f"optimizer.spectral.{name}", state, (1,), (0,))
        for name, state in states.items()
    }
    Path("checkpoint").mkdir()
    dist_checkpointing.save({"optimizer": objects}, "checkpoint")
    probes.save("radii", stored_radii(Path("checkpoint")))


def execute(page: Path) -> dict[str, Any]:
    """Run a page's blocks in order in one namespace; the line numbers are those of the block."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, Python block {number}", "exec", dont_inherit=True), namespace)
    return namespace


def execute_page() -> None:
    """What a rank of the zygote runs: the page that is its argument."""
    losses = execute(Path(sys.argv[1])).get("losses")
    assert losses is None or losses[-1] < 0.95 * losses[0], losses


def parse_flags() -> None:
    """What a rank of the zygote runs: parse, and validate what is complete, as training does."""
    from megatron.training import arguments

    for page, ranks, flags, is_complete in json.loads(sys.argv[1]):
        os.environ["WORLD_SIZE"] = str(ranks)
        sys.argv = ["pretrain_gpt.py", *flags]
        print("parsing", page, flags, flush=True)
        args = arguments.parse_args()
        if is_complete:
            arguments.validate_args(args, {})
        else:
            from sso_megatron.mcore.entry import check_and_register

            check_and_register(args)


def list_flags() -> None:
    """What a rank of the zygote runs: writes the flags of Megatron's parser, without ours and with them."""
    from megatron.training import arguments

    from sso_megatron.mcore.flags.parser import add_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    theirs = getattr(
        arguments.add_megatron_arguments, "_sso_megatron_original", arguments.add_megatron_arguments
    )
    theirs(parser)
    before = sorted(parser._option_string_actions)
    add_arguments(parser)
    Path(sys.argv[1]).write_text(json.dumps([before, sorted(parser._option_string_actions)]))


def spoil_a_weight() -> None:
    """One weight that is not a number, from the start."""

    def before(model: list[torch.nn.Module], optimizer: object) -> None:
        weights = dict(model[0].named_parameters())
        (name,) = [name for name in weights if name.endswith("layers.1.mlp.linear_fc2.weight")]
        weights[name].data[0, 0] = torch.nan

    probes.around_train(before, None)


def retract_before_training() -> None:
    """Have the loop start from weights on their spheres, by the optimizer's own retraction."""

    def retract(model: Any, optimizer: Any) -> None:
        for found in probes.spectral_optimizers(optimizer):
            members = {member.name: member for batch in found.batches for member in batch.members}
            for name, weight, _ in list(found.retracted()):
                members[name].split.write_(members[name].param.detach(), weight)

    probes.around_train(retract, None)
