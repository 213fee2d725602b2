"""The data part of a run: which text, which tokenizer, how long the sequences are, where the cache is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe.config import ConfigError, at_least, check
from moe.data.sources import SourceConfig
from moe.data.stdlib import StdlibConfig
from moe.data.tokenizer import ByteConfig, TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, which tokenizer, how long the sequences are."""

    source: SourceConfig = field(default_factory=StdlibConfig)
    tokenizer: TokenizerConfig = field(default_factory=ByteConfig)
    seq_len: int = 256
    """S, predicted tokens of a sequence; sequences have S + 1 tokens."""
    cache_dir: str = "~/.cache/moe"
    """Where prepared text and packed tokens are kept, for every run that reads the same."""
    validation_fraction: float = 0.05
    """Share of each domain's documents that is held out (a TFDS dataset has splits of its own instead)."""
    domain_weights: Literal["size", "equal"] = "size"
    """How the domains of one source are drawn: in proportion to their tokens, or all alike."""
    shuffle_seed: int = 0
    """Order of the documents before they are packed."""
    num_threads: int = 2
    """Threads that read ahead; they do not change the data."""
    prefetch: int = 16
    """Global steps kept ready; does not change the data."""
    read_retries: int = 4
    """Times that a read which failed is tried again before the run ends."""
    read_backoff_s: float = 1.0
    """Seconds before the first of these; doubled for each further one."""
    verify: bool = True
    """Compare packed tokens with their checksums at every start; False: only their lengths."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, seq_len=8, shuffle_seed=0, num_threads=0, prefetch=0)
        yield from at_least(self, read_retries=0, read_backoff_s=0)
        if self.shuffle_seed >= 2**32:
            yield "shuffle_seed", f"must be below 2**32 = {2**32}"
        if not 0 < self.validation_fraction <= 0.5:
            yield "validation_fraction", "must be above 0 and at most 0.5"
        if self.domain_weights not in ("size", "equal"):
            yield "domain_weights", "must be 'size' or 'equal'"
        if not self.cache_dir:
            yield "cache_dir", "must name a folder"


def check_inputs(config: DataConfig) -> None:
    """Raises ConfigError for a bad config and for input that cannot be read; writes nothing, needs no device.

    Reads all input files of a user once.
    """
    check(config, "data")
    place = Path(config.cache_dir).expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"data.cache_dir = {config.cache_dir!r}: cannot write to {str(place)!r}")
    config.tokenizer.build("data.tokenizer")
    for leaf in config.source.leaves("data.source"):
        leaf.source.check(leaf.where)
