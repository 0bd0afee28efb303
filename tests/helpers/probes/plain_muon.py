"""The optimizer of docs/development.md, "Muon in 40 lines", made from the block on the page."""

import re
from typing import Any

from helpers.paths import ROOT

PAGE = ROOT / "docs" / "development.md"


def run_block() -> dict[str, Any]:
    """Run the block, which enters ``plain_muon`` into this process's table of optimizers; its names."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    run_code(block_on_the_page(), namespace)
    return namespace


def block_on_the_page() -> str:
    section = PAGE.read_text(encoding="utf-8").split("\n## Muon in 40 lines\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(block)


def run_code(code: str, namespace: dict[str, Any]) -> None:
    exec(compile(code, f"{PAGE.name}, Muon in 40 lines", "exec", dont_inherit=True), namespace)


def register() -> None:
    """What a rank runs before Megatron parses its flags."""
    run_block()


def register_without_decay() -> None:
    """The same, without a setting for weight decay."""
    lines = block_on_the_page().splitlines(keepends=True)
    (decay,) = [line for line in lines if line.startswith("    weight_decay: float = ")]
    lines.remove(decay)
    run_code("".join(lines), {"__name__": "__docs__"})


def register_for_whole_matrices() -> None:
    """The same, as an algorithm that does not say that it works on shards."""
    run_block()["PlainMuon"].works_on_shards = False
