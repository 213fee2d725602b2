"""Typed frozen configs: check, print, diff, hash, save and load them. Standard library only.

A config is a `@dataclass(frozen=True, kw_only=True)` that lives beside the class it configures. The *type* of a config
selects the class, so a saved config names its types and `load` gives back the very same object.

A config says what is wrong with it through an optional method

    def problems(self) -> Iterator[tuple[str, str]]:   # (field, what it must be)

and `check` turns the first problem it meets into one line that names path, value and limit.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TYPE_KEY = "type"


class ConfigError(ValueError):
    """A config value that cannot work; the message is one line with path, value and limit."""


def is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def walk(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, config object) for `config` and every config below it, children first."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        children = value if isinstance(value, tuple) else (value,)
        for index, child in enumerate(children):
            if is_config(child):
                suffix = f".{index}" if isinstance(value, tuple) else ""
                yield from walk(child, f"{path}{field.name}{suffix}.")
    yield path, config


def check(config: Any, path: str = "") -> None:
    """Raises ConfigError for the first problem of `config` or of a config below it."""
    prefix = f"{path}." if path else ""
    for where, part in walk(config, prefix):
        for field, limit in part.problems() if hasattr(part, "problems") else ():
            raise ConfigError(f"{where}{field} = {_lookup(part, field)!r}: {limit}")


def at_least(config: Any, **limits: float) -> Iterator[tuple[str, str]]:
    """Problems of fields that are below their lower limit, for use inside `problems`."""
    for field, limit in limits.items():
        if getattr(config, field) < limit:
            yield field, f"must be at least {limit}"


def flatten(config: Any) -> dict[str, Any]:
    """Dotted path -> leaf value, with the type of every nested config as a leaf of its own. Sorted."""
    return dict(sorted(_leaves(to_dict(config), "")))


def render(config: Any) -> str:
    """The config as sorted `path = value` lines: what is printed, diffed and kept as a golden."""
    return "\n".join(f"{path} = {value!r}" for path, value in flatten(config).items())


def diff(old: Any, new: Any) -> list[str]:
    """One line for every path whose value differs, as `path: old -> new`."""
    a, b = flatten(old), flatten(new)
    return [f"{path}: {a.get(path)!r} -> {b.get(path)!r}" for path in sorted(a | b) if a.get(path) != b.get(path)]


def fingerprint(config: Any) -> str:
    """16 hexadecimal digits that change whenever a value or a type of the config does."""
    return hashlib.sha256(render(config).encode()).hexdigest()[:16]


def to_dict(value: Any) -> Any:
    """Plain JSON data; a nested config becomes a dict with the key `type` = 'module:Class'."""
    if is_config(value):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {TYPE_KEY: name} | {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def from_dict(data: Any) -> Any:
    """The inverse of `to_dict`; JSON lists come back as tuples."""
    if isinstance(data, dict) and TYPE_KEY in data:
        module, _, name = data[TYPE_KEY].partition(":")
        cls = getattr(importlib.import_module(module), name)
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"{data[TYPE_KEY]!r} is not a config type")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known - {TYPE_KEY}):
            raise ConfigError(f"{name} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        make: Any = cls
        return make(**{key: from_dict(item) for key, item in data.items() if key != TYPE_KEY})
    if isinstance(data, list):
        return tuple(from_dict(item) for item in data)
    return data


def save(config: Any, path: Path) -> None:
    path.write_text(json.dumps(to_dict(config), indent=1) + "\n")


def load(path: Path) -> Any:
    return from_dict(json.loads(path.read_text()))


def _leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        for index, item in enumerate(data):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, _tuples(data)


def _tuples(data: Any) -> Any:
    return tuple(_tuples(item) for item in data) if isinstance(data, list) else data


def _lookup(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config
