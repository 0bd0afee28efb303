"""Reads experiments, which are flags for Megatron, from the YAML files of ``configs/``.

A fragment is a mapping of flags to values. An experiment names fragments and adds flags of its own.
Values are kept as they are written: Megatron's parser decides what they mean.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import sso_megatron

Value = str | list[str]

_KEYS = ("about", "fragments", "flags", "sweep")


@dataclass(frozen=True)
class Given:
    """A flag's value and where it is written.

    Attributes:
        value: as written; a list for a flag with several values; ``true`` or ``false`` for a switch.
        path: path of the file, or a word for the command line.
    """

    value: Value
    path: Path | str


@dataclass(frozen=True)
class Experiment:
    """The contents of an experiment's file and of its fragments.

    Attributes:
        name: name of the file, without its folder and ending.
        path: path of the file.
        about: one line on the experiment.
        flags: flags in the order of the files; the experiment's own replace those of its fragments.
        sweep: values of flags, of which every combination is a point.
    """

    name: str
    path: Path
    about: str
    flags: dict[str, Given]
    sweep: dict[str, list[Value]]

    def points(self) -> list[dict[str, Value]]:
        """Return the grid of the sweep in the order of the file, its last flag changing fastest."""
        if not self.sweep:
            return []
        return [
            dict(zip(self.sweep, values, strict=True)) for values in itertools.product(*self.sweep.values())
        ]

    def point(self, index: int) -> dict[str, Value]:
        """Return one point of the sweep.

        Raises:
            ValueError: there is no such point.
        """
        points = self.points()
        if not points:
            raise ValueError(f"--point {index}: {self.name} has no sweep; leave it out")
        if not 0 <= index < len(points):
            raise ValueError(f"--point {index}: {self.name} has the points 0 to {len(points) - 1}")
        return points[index]


def point_name(point: Mapping[str, Value]) -> str:
    """Return a short name that fits into the name of a folder, such as ``lr=3e-3``."""
    parts = (
        f"{flag.lstrip('-')}={value if isinstance(value, str) else '+'.join(value)}"
        for flag, value in point.items()
    )
    return re.sub(r"[^\w.,=+-]", "_", ",".join(parts))


def configs_folder(given: Path | None) -> Path:
    """Return the folder with the configurations.

    Args:
        given: folder that the user named; None for the one of the checkout that this package runs from.

    Raises:
        ValueError: there is no such folder.
    """
    folder = given or Path(sso_megatron.__file__).resolve().parent.parent / "configs"
    if not (folder / "experiments").is_dir():
        if given is not None:
            raise ValueError(f"--configs {given}: has no folder experiments; name a folder like configs/")
        raise ValueError(
            "no configs/ beside this installed package; name the one of a checkout with --configs DIR"
        )
    return folder


def names(folder: Path) -> list[str]:
    """Return the names of all experiments in a folder of configurations."""
    return sorted(path.stem for path in (folder / "experiments").glob("*.yaml"))


def read(name: str, configs: Path | None = None) -> Experiment:
    """Read an experiment and its fragments.

    Args:
        name: name of an experiment in ``configs/experiments``, or a path to a YAML file.
        configs: folder with the configurations, see ``configs_folder``.

    Raises:
        ValueError: a file cannot be used; the message names the file and the key that are wrong.
    """
    folder = configs_folder(configs)
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else folder / "experiments" / f"{name}.yaml"
    if not path.is_file():
        way_out = "name a file" if is_path else f"{_closest(name, names(folder))}--list shows all"
        raise ValueError(f"{name}: no such experiment; {way_out}")
    content = _load(path)
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"{path}: {key}: not a part of an experiment, which has {', '.join(_KEYS)}")
    about = content.get("about")
    if not isinstance(about, str) or not about or "\n" in about:
        raise ValueError(f"{path}: about: say in one line what the experiment is")
    fragments = content.get("fragments", [])
    if not isinstance(fragments, list) or not all(isinstance(f, str) for f in fragments):
        raise ValueError(f"{path}: fragments: must be a list of names such as model/dense_1.7b")
    flags = _merged(path, folder, fragments)
    flags |= {flag: Given(value, path) for flag, value in _flags(path, content.get("flags", {})).items()}
    return Experiment(path.stem, path, about, flags, _sweep(path, content.get("sweep", {})))


def _merged(path: Path, folder: Path, fragments: list[str]) -> dict[str, Given]:
    merged: dict[str, Given] = {}
    for name in fragments:
        file = folder / f"{name}.yaml"
        if not file.is_file() or name.startswith("experiments/"):
            known = (p.relative_to(folder).with_suffix("") for p in folder.glob("*/*.yaml"))
            close = _closest(name, (str(p) for p in known if p.parts[0] != "experiments"))
            raise ValueError(f"{path}: fragments: {name}: no such file in {folder}; {close}mend the name")
        for flag, value in _flags(file, _load(file)).items():
            other = merged.get(flag)
            if other is not None and other.value != value:
                raise ValueError(
                    f"{path}: {flag} is {_shown(other.value)} in {other.path} and {_shown(value)} in "
                    f"{file}; take one of them out of fragments, or the flag out of one"
                )
            merged.setdefault(flag, Given(value, file))
    return merged


def _flags(path: Path, found: Any) -> dict[str, Value]:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must map flags to values, such as --num-layers: 28")
    for flag, value in found.items():
        _check_flag(path, flag)
        _check_value(path, flag, value)
    return found


def _sweep(path: Path, found: Any) -> dict[str, list[Value]]:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: sweep: must map flags to lists, such as --lr: [1e-3, 3e-3]")
    for flag, values in found.items():
        _check_flag(path, flag)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: sweep: {flag}: must be a list of values, such as [1e-3, 3e-3]")
        for value in values:
            _check_value(path, flag, value)
        labels = [point_name({flag: value}) for value in values]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: sweep: two points would have the name {twice}; take one out")
    return found


def _check_flag(path: Path, flag: str) -> None:
    if not flag.startswith("--"):
        raise ValueError(f"{path}: {flag}: write flags as Megatron has them, --{flag.lstrip('-')}")


def _check_value(path: Path, flag: str, value: Any) -> None:
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{path}: {flag}: must be one value or a list of values")
    if not parts or "" in parts:
        raise ValueError(f"{path}: {flag}: has no value; write one, or true for a switch")


class _Loader(yaml.BaseLoader):
    """Reads scalars as they are written; a key that occurs twice is an error, as YAML has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands there twice; take one out", key.start_mark
                )
            found.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{path}: {line}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of keys to values")
    return content


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _closest(name: str, known: Iterable[str]) -> str:
    """Return a hint, or an empty text where no name is like this one."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""
