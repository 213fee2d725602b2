"""A prepared corpus: the training sequences in their global order, and the held-out text of each domain."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from moe.config import ConfigError, check
from moe.data.config import DataConfig
from moe.data.documents import DocumentSplits, TextColumn
from moe.data.packing import Stream, Windows, pack, pack_to_disk
from moe.data.reading import DataError, Patience
from moe.data.sources import Leaf
from moe.data.tokenizer import Tokenizer


class _Domain(NamedTuple):
    train: Stream
    weight: float  # share of the training sequences
    validation: TextColumn
    documents: np.ndarray  # its documents in `validation`


class Validation:
    """Held-out text of one domain: `text_bytes` are the bytes that `batches` encodes, `num_bytes` their number."""

    def __init__(self, domain: str, texts: list[str], tokenizer: Tokenizer, index: int = 0):
        self.text_bytes = "".join(texts).encode()
        self.num_bytes = len(self.text_bytes)
        self._stream = pack(texts, tokenizer, domain)
        self._index = index

    def batches(self, batch_size: int, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
        """Every token once, in order: the dicts of `packing.Windows`, int32 [batch_size, S + 1].

        The last batch is filled up with rows of padding (segment id 0).
        """
        windows = Windows(self._stream, seq_len, self._index)
        padding = {name: np.zeros_like(value) for name, value in windows[0].items()}
        for start in range(0, len(windows), batch_size):
            rows = [windows[i] for i in range(start, min(start + batch_size, len(windows)))]
            rows += [padding] * (batch_size - len(rows))
            yield {name: np.stack([row[name] for row in rows]) for name in padding}


class Corpus:
    """What `prepare` returns.

    Attributes: `fingerprint`, which changes with anything that changes the training sequences or their order for a
    given seed, but not with where the input or the cache lies; `domains`, sorted; `tokenizer`; `seq_len`.
    """

    def __init__(self, domains: dict[str, _Domain], tokenizer: Tokenizer, seq_len: int, fingerprint: str):
        self._domains = domains
        self.domains = tuple(domains)
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.fingerprint = fingerprint

    def num_train_tokens(self, domain: str) -> int:
        """Tokens in the training stream of `domain`, bos and eos included."""
        return len(self._domains[domain].train.tokens)

    def num_train_bytes(self, domain: str) -> int:
        """UTF-8 bytes of text in the training stream of `domain`."""
        return self._domains[domain].train.num_bytes

    def train_dataset(self, seed: int) -> grain.MapDataset:
        """Endless and of random access: element i is sequence i of the global order, as `packing.Windows` gives it.

        Each domain is shuffled anew every epoch of its own, so that it shows each window once before any again;
        domains are interleaved in proportion to their weights (to 1 % of the smallest).
        """
        parts = [
            grain.MapDataset.source(Windows(domain.train, self.seq_len, i)).shuffle(seed=_seed(seed, name)).repeat()
            for i, (name, domain) in enumerate(self._domains.items())
        ]
        return grain.MapDataset.mix(parts, [domain.weight for domain in self._domains.values()])

    def validation(self, domain: str, max_bytes: int | None = None) -> Validation:
        """The held-out documents of `domain`, whole up to `max_bytes`, the last one cut between two characters."""
        held_out = self._domains[domain]
        texts: list[str] = []
        room = float("inf") if max_bytes is None else max_bytes
        for _, text in held_out.validation.read(held_out.documents):
            if (size := len(text.encode())) > room:
                text = text.encode()[: int(room)].decode(errors="ignore")
            if text.strip():
                texts.append(text)
            room -= size
            if room <= 0:
                break
        if not texts:
            raise ConfigError(f"max_bytes = {max_bytes}: leaves no validation text of domain {domain!r}")
        return Validation(domain, texts, self.tokenizer, self.domains.index(domain))


def prepare(config: DataConfig) -> Corpus:
    """Builds what is not in the cache yet and opens the corpus; idempotent, and safe to run in several processes.

    Raises ConfigError for a bad config or input that cannot be read, DataError for a cache that cannot be read or
    written, or whose files are not what was written.
    """
    check(config, "data")
    tokenizer = config.tokenizer.build("data.tokenizer")
    cache = Path(config.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir = {config.cache_dir!r}: cannot be made ({error.strerror})") from error
    leaves = list(config.source.leaves("data.source"))
    try:
        prepared = [_prepare(leaf, config, tokenizer, cache) for leaf in leaves]
    except OSError as error:
        where = error.filename or cache
        raise DataError(f"{where}: {error.strerror or error}; nothing half-made is left in data.cache_dir") from error
    counts = Counter(stream.domain for _, streams in prepared for stream in streams)
    domains = {}
    for index, (leaf, (splits, streams)) in enumerate(zip(leaves, prepared, strict=True)):
        sizes = np.array([len(s.tokens) if config.domain_weights == "size" else 1.0 for s in streams])
        held_out = splits.validation.domains()
        for stream, share in zip(streams, sizes / sizes.sum(), strict=True):
            name = stream.domain if counts[stream.domain] == 1 else f"{stream.domain}-{index}"
            domains[name] = _Domain(stream, leaf.weight * share, splits.validation, held_out[stream.domain])
    domains = dict(sorted(domains.items()))
    parts = [tokenizer.fingerprint, config.seq_len, config.shuffle_seed]
    parts += [splits.fingerprint for splits, _ in prepared]
    parts += [(name, domain.weight) for name, domain in domains.items()]
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return Corpus(domains, tokenizer, config.seq_len, fingerprint)


def _prepare(leaf: Leaf, config: DataConfig, tokenizer: Tokenizer, cache: Path) -> tuple[DocumentSplits, list[Stream]]:
    """The documents of one source and the packed streams of its domains."""
    patience = Patience(config.read_retries, config.read_backoff_s)
    splits = leaf.source.open(leaf.where, cache, config.validation_fraction)
    train, validation = (dataclasses.replace(part, patience=patience) for part in (splits.train, splits.validation))
    streams = pack_to_disk(
        train, tokenizer, cache, splits.fingerprint, config.shuffle_seed, patience=patience, content=config.verify
    )
    if not streams:
        raise ConfigError(f"{leaf.where}: has no text to train on")
    return DocumentSplits(splits.fingerprint, train, validation), streams


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")
