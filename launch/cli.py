"""From a config file and the words behind it to a checked config; every mistake is one line and exit status 2."""

import contextlib
import importlib.util
import inspect
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from launch.exits import EXPECTED, status_of
from moe.config import ConfigError, check, load

if TYPE_CHECKING:
    from moe.train.run import RunConfig

Config = TypeVar("Config")
OPTIONS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
MISTAKES = (SyntaxError, ImportError, NameError, AttributeError, TypeError)
"""What a slip in a config file raises; anything else keeps its traceback."""
_BOX = re.compile(r"[\u2500-\u257f]+")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an expected error into `error: ...` on stderr and its exit status: 2 for a mistake in the config."""
    try:
        yield
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(status_of(error)) from None


def without_config(words: Sequence[str], doc: str | None, usage: str) -> int | None:
    """None if a config stands first; else says how the command is used and returns its exit status."""
    if words and not words[0].startswith("-"):
        return None
    asked = words[:1] in (["-h"], ["--help"])
    print(f"{doc}\n{usage}" if asked else f"error: {usage}", file=sys.stderr)
    return 0 if asked else 2


def run_config(spec: str, words: Sequence[str], prog: str) -> "RunConfig":
    """The RunConfig of the file with the words applied, checked; `prog` is the command, as in python -m launch.plan."""
    from moe.train.run import RunConfig

    base = load_function(spec)
    if not isinstance(base, RunConfig):
        raise ConfigError(f"config = {spec!r}: must return a RunConfig, got {type(base).__name__}")
    return override(base, words, f"{prog} {spec}")


def take(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What the options `--NAME VALUE` or `--NAME=VALUE` of these names say, and the other words."""
    found: dict[str, str] = {}
    rest, left = [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in names:
            rest.append(word)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"{name}: --{name} needs a value")
            value = left.pop(0)
        found[name] = value
    return found, rest


def load_function(spec: str, default: str = "get_config") -> object:
    """Calls `path/to/file.py[:function]`, by default `get_config`; or loads `path/to/config.json`, a saved config."""
    if spec.endswith(".json"):
        return _load_saved(spec)
    path, _, name = spec.partition(":")
    name = name or default
    functions = load_functions(path)
    if name not in functions:
        raise ConfigError(f"config = {spec!r}: {path} has no function {name!r}; it has {', '.join(functions)}")
    try:
        return functions[name]()
    except MISTAKES as error:
        raise _mistake(path, error) from error


def _load_saved(path: str) -> object:
    if not Path(path).is_file():
        raise ConfigError(f"config = {path!r}: there is no such file")
    try:
        return load(Path(path))
    except (*MISTAKES, ValueError, KeyError) as error:
        raise ConfigError(f"config = {path!r}: is not a config of this version: {error}") from error


def load_functions(path: str) -> dict[str, Callable[[], object]]:
    """The public functions that a config file defines, in their order there."""
    if not Path(path).is_file():
        raise ConfigError(f"config = {path!r}: there is no such file")
    module_spec = importlib.util.spec_from_file_location(f"configs.{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"config = {path!r}: is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except MISTAKES as error:
        raise _mistake(path, error) from error
    mine = [
        value for value in vars(module).values() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    return {value.__name__: value for value in mine if not value.__name__.startswith("_")}


def _mistake(path: str, error: Exception) -> ConfigError:
    """What is wrong in the config file, with the line in that file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    # A SyntaxError says its line itself.
    where = f" (line {lines[-1]})" if lines and not isinstance(error, SyntaxError) else ""
    return ConfigError(f"config = {path!r}: {type(error).__name__}: {error}{where}")


def override(config: Config, words: Sequence[str], prog: str) -> Config:
    """`config` with the command line's `--dotted.path value` pairs, checked; ConfigError with one line on a mistake."""
    changed = parse(type(config), words, prog, default=config)
    check(changed)
    return changed


def parse(kind: type[Config], words: Sequence[str] | None, prog: str, default: Config | None = None) -> Config:
    """A dataclass from the command line; ConfigError with one line where tyro would print a box."""
    said = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=prog, config=OPTIONS, **given)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_flatten(said.getvalue())) from None
        raise


def _flatten(box: str) -> str:
    """tyro's boxed message as one line."""
    lines = [_BOX.sub(" ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.split(r" Argument helptext:| For full helptext,", text)[0]
    return re.sub(
        r"\s+", " ", re.sub(r"^(Unrecognized options|Value error|Missing argument|Required options) ", "", text)
    ).strip()
