"""Write the tables of flags in the documentation: ``python docs/generate.py``.

Each stands between ``<!-- flags: GROUP -->`` and ``<!-- /flags -->``, where GROUP is the title of a group
of the plugin's own argument parser; what is between the markers is replaced.
"""

import argparse
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sso_megatron.mcore.flags.optimizers import config_classes, flag_fields
from sso_megatron.mcore.flags.parser import add_arguments
from sso_megatron.optimizers.settings import choices_of

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "configuration.md"
_TITLE = "sso_megatron: "
_MARKED = re.compile(r"(<!-- flags: ([^\n]+) -->\n).*?(<!-- /flags -->)", re.DOTALL)
_SETTINGS = {
    f"{prefix}_{field.name}": (config_type, field)
    for prefix, config_type in config_classes().items()
    for field in flag_fields(prefix)
}
"""Dataclass and field by the name that the parser stores the flag's value under."""


def groups(
    add: Callable[[argparse.ArgumentParser], Any] = add_arguments,
) -> dict[str, list[argparse.Action]]:
    """Flags by the title of their group, as the plugin adds them to Megatron's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    found = {group.title or "": list(group._group_actions) for group in parser._action_groups}
    return {title.removeprefix(_TITLE): actions for title, actions in found.items() if actions}


def table(actions: list[argparse.Action]) -> str:
    """The Markdown table of a group: a row for each flag, in the order of ``--help``."""
    lines = ["| flag | default | values | meaning | source |", "|---|---|---|---|---|"]
    for action in actions:
        meaning = _meaning(action).replace("*", "\\*")
        cells = (_flags(action), _default(action), _values(action), meaning, _source(action))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _flags(action: argparse.Action) -> str:
    return ", ".join(f"`{flag}`" for flag in action.option_strings)


def _default(action: argparse.Action) -> str:
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    return "none" if action.default in (None, ()) else f"`{action.default}`"


def _values(action: argparse.Action) -> str:
    """Choices, or the rule, or at least the kind of value."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "on, off"
    if action.dest in _SETTINGS:
        config_type, field = _SETTINGS[action.dest]
        if choices := choices_of(config_type, field.name):
            return ", ".join(f"`{choice}`" for choice in choices)
        kind = typing.get_type_hints(config_type)[field.name]
        number = {int: "integer", float: "number"}.get(kind, "")
        rule = field.metadata["rule"]
        if rule is not None:
            return f"{number}, {rule.text.removeprefix('be ').removeprefix('lie ')}"
        return number or f"`{action.metavar}`"
    choices = re.findall(r"\w+", str(action.metavar)) if str(action.metavar).startswith("{") else []
    shown = ", ".join(f"`{choice}`" for choice in choices) or f"`{action.metavar}`"
    return "integer" if action.type is int else shown


def _meaning(action: argparse.Action) -> str:
    if action.dest in _SETTINGS:
        return _SETTINGS[action.dest][1].metadata["help"]
    return re.sub(r" \(default \w+\)$", "", str(action.help))


def _source(action: argparse.Action) -> str:
    return (action.dest in _SETTINGS and _SETTINGS[action.dest][1].metadata["source"]) or "ours"


def refreshed(text: str) -> str:
    """The page's text with every table as the parser is now."""
    found = groups()
    return _MARKED.sub(lambda match: match[1] + table(found[match[2]]) + match[3], text)


def main() -> None:
    """Rewrite the page, if a table changed."""
    old = PAGE.read_text(encoding="utf-8")
    new = refreshed(old)
    if new != old:
        PAGE.write_text(new, encoding="utf-8")
        print(f"rewrote {PAGE.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
