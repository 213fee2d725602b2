"""The configs of a sweep as a space of points: grids, zips, lists and whole configs, their products and their sums.

    Configs(of={"top_k": top_k, "switch": switch}) * Grid(over={"optim.learning_rate": (1e-3, 3e-3)})

are four points, `Grid(...) + Listed(...)` those of the one and then those of the other.
"""

import abc
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from moe.config import ConfigError
from moe.train.run import RunConfig

MakeConfig = Callable[[], RunConfig]


class Point(NamedTuple):
    """A config, or changes of one, or both."""

    parts: tuple[str | tuple[str, Any], ...]
    """What the name is made of: given names, and (path, value) of changes that have none."""
    config: RunConfig | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    """(dotted path, value), applied in this order."""
    note: str = ""
    """What it is, in a few words."""


class Space(abc.ABC):
    """Points in a fixed order; `a * b` has every point of b for every one of a, `a + b` those of a and then of b."""

    @abc.abstractmethod
    def points(self) -> Iterator[Point]:
        """Raises ConfigError for what cannot be a space."""

    def __mul__(self, other: "Space") -> "Space":
        return _Product(first=self, second=other)

    def __add__(self, other: "Space") -> "Space":
        return _Sum(first=self, second=other)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configs(Space):
    """Whole configs by name: RunConfig values, or functions of a config file, whose docstring says what they are."""

    of: Mapping[str, RunConfig | MakeConfig]

    def points(self) -> Iterator[Point]:
        for name, made in self.of.items():
            config = made if isinstance(made, RunConfig) else made()
            if not isinstance(config, RunConfig):
                raise ConfigError(f"configs = {name!r}: must return a RunConfig, got {type(config).__name__}")
            note = "" if isinstance(made, RunConfig) else (inspect.getdoc(made) or "")
            yield Point((name,), config, note=" ".join(note.partition("\n\n")[0].split()))


def configs_in(module: ModuleType) -> Configs:
    """The public functions that a config file defines, in their order there."""
    mine = [one for one in vars(module).values() if inspect.isfunction(one) and one.__module__ == module.__name__]
    return Configs(of={one.__name__: one for one in mine if not one.__name__.startswith("_")})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Space):
    """Every combination of the values of each path; the last path changes fastest."""

    over: Mapping[str, Sequence[Any]]

    def points(self) -> Iterator[Point]:
        _check_values("grid", self.over)
        for values in itertools.product(*self.over.values()):
            yield _unnamed(tuple(zip(self.over, values, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zip(Space):
    """The first values of all paths together, then the second ones, ..."""

    over: Mapping[str, Sequence[Any]]

    def points(self) -> Iterator[Point]:
        _check_values("zip", self.over)
        lengths = {path: len(values) for path, values in self.over.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{path} has {length}" for path, length in lengths.items())
            raise ConfigError(f"zip: paths must have equally many values; {said}")
        for values in zip(*self.over.values(), strict=True):
            yield _unnamed(tuple(zip(self.over, values, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed(Space):
    """Points by name, each with changes of its own; none at all is the config as it is."""

    of: Mapping[str, Mapping[str, Any]]

    def points(self) -> Iterator[Point]:
        for name, changes in self.of.items():
            yield Point((name,), changes=tuple(changes.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product(Space):
    first: Space
    second: Space

    def points(self) -> Iterator[Point]:
        seconds = tuple(self.second.points())
        for a, b in itertools.product(self.first.points(), seconds):
            if a.config is not None and b.config is not None:
                raise ConfigError(
                    f"product: {a.parts[0]!r} and {b.parts[0]!r} are both whole configs; add them instead"
                )
            note = "; ".join(filter(None, (a.note, b.note)))
            yield Point(a.parts + b.parts, a.config or b.config, a.changes + b.changes, note)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sum(Space):
    first: Space
    second: Space

    def points(self) -> Iterator[Point]:
        yield from self.first.points()
        yield from self.second.points()


def _unnamed(changes: tuple[tuple[str, Any], ...]) -> Point:
    return Point(changes, changes=changes)


def _check_values(kind: str, over: Mapping[str, Sequence[Any]]) -> None:
    for path, values in over.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"{kind}: {path} = {values!r}: must be a tuple of at least one value")
