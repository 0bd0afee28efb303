"""docs/troubleshooting.md quotes messages as the source has them, and leaves none of a run out."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from helpers.paths import ROOT

PACKAGE = ROOT / "sso_megatron"
WORDS = 5
"""A code span of so many words on the page is a quotation, and so long a string of ours a message."""

ELSEWHERE = {
    "cli/*": "the commands' own options and output; but see SCRIPTS",
    "mcore/compat/private_names.py": "what each name is used for, which is printed nowhere",
    "mcore/flags/megatron_parser.py": "sso-megatron render",
    "mcore/offline/*": "sso-megatron export and plot --weights",
    "mcore/plan/*": "sso-megatron plan, whose warnings say the way out",
    "optimizers/config.py": "docs/configuration.md has the rules",
    "optimizers/settings.py": "likewise",
    "runs/alarms.py": "docs/monitoring.md has the alarms",
    "runs/criterion_table.py": "sso-megatron criterion",
    "runs/reader.py": "sso-megatron plot",
}
SCRIPTS = ("cli/train/pretrain_gpt.py", "cli/train/run.py")
NO_MESSAGES = ("help", "message", "metavar")
"""Keyword arguments whose strings are printed by nobody, or by --help."""


def canonical(node: ast.Constant | ast.JoinedStr) -> str:
    """A string, or an f-string with ``...`` for what is put in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    shown = [str(p.value) if isinstance(p, ast.Constant) else "..." for p in parts]
    return " ".join("".join(shown).split())


def strings(node: ast.AST, skipped: tuple[str, ...] = NO_MESSAGES) -> Iterator[str]:
    """Strings below a node, in whole; documentation is none, nor what is passed by a name to be skipped."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr):
            yield canonical(child)
        elif isinstance(child, ast.Constant):
            if isinstance(child.value, str):
                yield canonical(child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        elif not (isinstance(child, ast.keyword) and child.arg in skipped):
            yield from strings(child, skipped)


def messages(module: Path) -> list[str]:
    """Strings of a module that are long enough to say something."""
    found = strings(ast.parse(module.read_text(encoding="utf-8")))
    return [text for text in found if len(re.findall(r"(?<!\S)\S*[a-z]\S*", text)) >= WORDS]


def in_scope(module: Path) -> bool:
    name = module.relative_to(PACKAGE).as_posix()
    return name in SCRIPTS or not any(fnmatch(name, pattern) for pattern in ELSEWHERE)


MODULES = sorted(PACKAGE.rglob("*.py"))
SECTIONS = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("\n## ")


def quotations(sections: list[str]) -> list[str]:
    """Code spans of the page that quote a message, without the dots at either end."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "".join(sections))]
    return [
        span.removeprefix("...").removesuffix("...").strip() for span in spans if len(span.split()) >= WORDS
    ]


QUOTED = quotations(SECTIONS)


def test_every_quotation_is_in_the_source() -> None:
    there = [text for module in MODULES for text in strings(ast.parse(module.read_text(encoding="utf-8")))]
    theirs = "\n".join(their_strings())
    for quote in QUOTED:
        assert any(quote in text for text in there) or quote in theirs, f"nobody prints {quote!r}"


def their_strings() -> Iterator[str]:
    """Of torch's sockets, and of the few modules of Megatron whose messages the page quotes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with pytest.raises(dist.DistNetworkError) as error:
        dist.TCPStore("127.0.0.1", store.port, is_master=True)
    yield str(error.value)
    site = Path(sysconfig.get_path("purelib"))
    for name in (
        "megatron/training/arguments.py",
        "megatron/core/optimizer/__init__.py",
        "megatron/core/optimizer_param_scheduler.py",
        "megatron/core/distributed/param_and_grad_buffer.py",
    ):
        yield from strings(ast.parse((site / name).read_text(encoding="utf-8")), skipped=())


@pytest.mark.parametrize(
    "module", [m for m in MODULES if in_scope(m) and messages(m)], ids=lambda m: str(m.relative_to(PACKAGE))
)
def test_no_message_is_left_out(module: Path) -> None:
    for text in messages(module):
        assert any(quote in text for quote in QUOTED), (
            f"docs/troubleshooting.md does not quote {text!r}: say there what to do, or why it need not"
        )


def test_the_summary_of_torchrun_has_its_name() -> None:
    name = f"{ChildFailedError.__module__}.{ChildFailedError.__qualname__}"
    assert f"`{name}`" in SECTIONS[-1]


def test_what_is_elsewhere_is_there() -> None:
    for pattern in ELSEWHERE:
        assert list(PACKAGE.glob(pattern)), pattern
