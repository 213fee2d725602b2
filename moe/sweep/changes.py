"""One field of a config, named by its dotted path, replaced by another value of the field's type."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from moe.config import ConfigError, is_config


def with_value(config: Any, path: str, value: Any) -> Any:
    """`config` with the field at `path` (`model.moe.num_experts`, `balance.0.coefficient`) set to `value`.

    Raises ConfigError, with path and value, for a path that leads nowhere and a value that is not of the field's type.
    What a value of the right type must be is left to `moe.config.check`, which sees the whole config.
    """
    return _replace(config, path.split("."), value, f"{path} = {value!r}")


def _replace(part: Any, names: list[str], value: Any, said: str) -> Any:
    name, rest = names[0], names[1:]
    if isinstance(part, tuple):
        if not name.isdecimal() or int(name) >= len(part):
            raise ConfigError(f"{said}: {name!r} must be an index below {len(part)}")
        index = int(name)
        return (*part[:index], _inner(part[index], name, rest, value, said), *part[index + 1 :])
    fields = [field.name for field in dataclasses.fields(part)]
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4) or fields
        raise ConfigError(f"{said}: {type(part).__name__} has no field {name!r}; nearest: {', '.join(near)}")
    if rest:
        return dataclasses.replace(part, **{name: _inner(getattr(part, name), name, rest, value, said)})
    hint = typing.get_type_hints(type(part))[name]
    if not fits(hint, value):
        raise ConfigError(f"{said}: must be {_describe(hint)}, got {type(value).__name__}")
    return dataclasses.replace(part, **{name: _as_float(hint, value)})


def _inner(child: Any, name: str, rest: list[str], value: Any, said: str) -> Any:
    if not rest:
        if type(child) is not type(value):
            raise ConfigError(f"{said}: must be {type(child).__name__}, got {type(value).__name__}")
        return value
    if not is_config(child) and not isinstance(child, tuple):
        raise ConfigError(f"{said}: {name} is {child!r}, which has no field {rest[0]!r}")
    return _replace(child, rest, value, said)


def fits(hint: Any, value: Any) -> bool:
    """Whether `value` is of the type that an annotation says; an int is a float too, a bool is neither."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(one, value) for one in inner)
    if origin is typing.Literal:
        return value in inner and not (isinstance(value, bool) and not any(isinstance(one, bool) for one in inner))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(fits(inner[0], item) for item in value)
        return len(value) == len(inner) and all(map(fits, inner, value))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is None:
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def _as_float(hint: Any, value: Any) -> Any:
    """An int where the field holds floats, as the float that the command line would make of it: it is the same run."""
    kinds = typing.get_args(hint) or (hint,)
    return float(value) if type(value) is int and float in kinds and int not in kinds else value


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
