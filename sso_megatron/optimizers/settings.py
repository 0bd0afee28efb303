"""Declares, checks and describes settings; the settings themselves are in ``config``."""

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """What a setting's value must be, beyond its type.

    Attributes:
        text: completes "must"; the documentation shows it.
        holds: whether a value is allowed.
    """

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("be positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("be finite and not negative", lambda value: 0 <= value < math.inf)
DECAY = Rule("lie in [0, 1)", lambda value: 0 <= value < 1)


def at_least(least: int) -> Rule:
    """Return the rule that a value must not be less than ``least``."""
    return Rule(f"be at least {least}", lambda value: value >= least)


def setting(
    default: Any, help: str, source: str = "", rule: Rule | None = None, by_group: bool = False
) -> Any:
    """Return a dataclass field with its rule, and its text for the flag's help and the documentation.

    Args:
        default: value where none is given.
        help: what the setting does.
        source: where the default is from.
        rule: what a value must keep.
        by_group: whether a parameter group may have a value of its own. So may settings that change neither
            what is kept of a matrix nor what a step costs.
    """
    metadata = {"help": help, "source": source, "rule": rule, "by_group": by_group}
    return field(default=default, metadata=metadata)


def group_settings(config_type: type) -> tuple[str, ...]:
    """Return the names of the settings that a parameter group may have for itself."""
    return tuple(f.name for f in dataclasses.fields(config_type) if f.metadata.get("by_group"))


def require(config: Any, name: str, ok: bool, rule: str) -> None:
    """Raise ValueError with the setting's name, its value, the rule and the default unless ``ok``."""
    if not ok:
        raise ValueError(
            f"{name}={getattr(config, name)!r} {rule}; the default is {default_of(type(config), name)!r}"
        )


def default_of(config_type: type, name: str) -> Any:
    """Return the default of one field of a configuration dataclass."""
    return next(f.default for f in dataclasses.fields(config_type) if f.name == name)


def choices_of(config_type: type, name: str) -> tuple[Any, ...]:
    """Return the values that a ``Literal`` field may take; none for another field."""
    hint = typing.get_type_hints(config_type)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def check_fields(config: Any) -> None:
    """Raise ValueError unless every field has its type and keeps its choices and rule; see ``require``."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint, rule = getattr(config, f.name), hints[f.name], f.metadata["rule"]
        choices = choices_of(type(config), f.name)
        if choices:
            listed = ", ".join(map(str, choices))
            require(config, f.name, value in choices, f"must be one of {listed}")
        elif hint is bool:
            require(config, f.name, isinstance(value, bool), "must be True or False")
        elif hint in (int, float):
            is_number = isinstance(value, (int, hint)) and not isinstance(value, bool)
            require(config, f.name, is_number, f"must be {'an integer' if hint is int else 'a number'}")
        if rule is not None:
            require(config, f.name, rule.holds(value), f"must {rule.text}")


def one_config[C](config_type: type[C], config: C | None, settings: dict[str, Any]) -> C:
    """Return the configuration that was given as an object, or make it from settings by name.

    Raises:
        TypeError: both were given, or a setting does not exist.
    """
    if config is not None and settings:
        raise TypeError(f"give config or {', '.join(settings)}, not both")
    return config if config is not None else config_type(**settings)
