"""A sweep: a space of configs, seeds and a baseline, as checked runs with names that stay the same."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from moe.config import ConfigError, check, fingerprint, is_config
from moe.sweep.changes import with_value
from moe.sweep.spaces import Point, Space
from moe.train.run import RunConfig

RESERVED = ("sweep", "report")
"""Folders of a sweep that are no variant's."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,199}")


class SweepRun(NamedTuple):
    """One run: a variant with a seed."""

    name: str
    """Of the variant."""
    config: RunConfig
    """With the seed in it."""
    note: str = ""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def folder(self) -> str:
        """Where it runs, from the sweep's folder on."""
        return f"{self.name}/seed-{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every variant with every seed."""

    variants: Space
    base: RunConfig | None = None
    """What points that are no whole configs change."""
    seeds: tuple[int, ...] = (0,)
    """Each of them for every variant; with at least 3 the intervals of the report are worth reading."""
    baseline: str | None = None
    """Name of the variant that the others are compared with, seed by seed."""
    keep: Callable[[RunConfig], bool] | None = None
    """Filter: variants for whose config it is false are left out."""

    def runs(self, changes: Sequence[tuple[str, Any]] = ()) -> tuple[SweepRun, ...]:
        """All variants of the first seed, then those of the next. `changes` are made to every config at the end.

        Raises ConfigError, one line with path and value, for anything that could not run as it is meant.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"sweep: seeds = {self.seeds}: must be at least one and each only once")
        if self.keep is not None and not callable(self.keep):
            raise ConfigError(f"sweep: keep = {self.keep!r}: must be a function of a config")
        variants = [SweepRun(name, config, note) for name, config, note in self._variants(changes)]
        if not variants:
            raise ConfigError("sweep: has no variant" + (" that `keep` keeps" if self.keep is not None else ""))
        _refuse_doubles(variants)
        names = [variant.name for variant in variants]
        if self.baseline is not None and self.baseline not in names:
            raise ConfigError(f"sweep: baseline = {self.baseline!r}: is none of the variants {', '.join(names)}")
        return tuple(
            variant._replace(config=dataclasses.replace(variant.config, seed=seed))
            for seed in self.seeds
            for variant in variants
        )

    def _variants(self, changes: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, RunConfig, str]]:
        points = list(self.variants.points())
        short = _short_paths({part[0] for point in points for part in point.parts if isinstance(part, tuple)})
        for point in points:
            name = ",".join(part if isinstance(part, str) else f"{short[part[0]]}={_label(part[1])}"
                            for part in point.parts)  # fmt: skip
            try:
                config = self._config(point, changes)
            except ConfigError as error:
                raise ConfigError(f"sweep, variant {name!r}: {error}") from None
            if not _NAME.fullmatch(name) or name in RESERVED:
                raise ConfigError(
                    f"sweep: variant {name!r}: must be a name of letters, digits and ._+=,- that is not one of"
                    f" {', '.join(RESERVED)}, as it is a folder's too; give it one in Listed or Configs"
                )
            if self.keep is None or self.keep(config):
                yield name, config, point.note

    def _config(self, point: Point, changes: Sequence[tuple[str, Any]]) -> RunConfig:
        config = self.base if point.config is None else point.config
        if config is None:
            raise ConfigError("changes no config: give the sweep a `base`, or multiply by Configs")
        seen: set[str] = set()
        for path, value in point.changes:
            if path in seen:
                raise ConfigError(f"{path} = {value!r}: is set twice")
            seen.add(path)
            config = with_value(config, path, value)
        for path, value in changes:
            config = with_value(config, path, value)
        if "seed" in seen or any(path == "seed" for path, _ in changes):
            raise ConfigError("seed: is no variant; give the sweep's `seeds`")
        config = dataclasses.replace(config, seed=self.seeds[0])
        check(config)
        return config


def _refuse_doubles(variants: Sequence[SweepRun]) -> None:
    for name, count in Counter(variant.name for variant in variants).items():
        if count > 1:
            raise ConfigError(f"sweep: {count} variants are called {name!r}; give them names in Listed or Configs")
    first: dict[str, str] = {}
    for variant in variants:
        other = first.setdefault(fingerprint(variant.config), variant.name)
        if other != variant.name:
            raise ConfigError(f"sweep: variants {other!r} and {variant.name!r} are the same config; drop one")


def _short_paths(paths: set[str]) -> dict[str, str]:
    """The end of every path, as short as it can be without being another's too: `moe.num_experts`, `learning_rate`."""
    found = {}
    for path in paths:
        names = path.split(".")
        ends = (".".join(names[-count:]) for count in range(1, len(names) + 1))
        others = [f".{other}" for other in paths if other != path]
        found[path] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), path)
    return found


def _label(value: Any) -> str:
    """A value in a name: numbers as Python writes them, a config by its type, a tuple's items with x between them."""
    if is_config(value):
        return type(value).__name__.removesuffix("Config")
    if isinstance(value, tuple):
        return "x".join(map(_label, value)) or "none"
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value)) or "empty"
