"""Packing: the documents of a domain as one stream of tokens on disk, read as windows of fixed length.

A document is bos + tokens + eos. Window i of a stream covers `stream[i * S : i * S + S + 1]`: windows overlap in one
token, so that every token but the first of the stream is the target of exactly one window.
"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.data.documents import TextColumn, building
from moe.data.reading import Checksums, DataError, Patience, TokenFile, checksums, verify
from moe.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 2  # part of the cache key: raise it when the same documents are packed or recorded in another way
INDEX = "domains.json"


class Stream(NamedTuple):
    """The documents of a domain, one behind the other."""

    domain: str
    tokens: np.ndarray | TokenFile  # integers [n]
    starts: np.ndarray  # int64 [documents + 1], where each document starts; the last one is n
    num_bytes: int  # of text in UTF-8


class Windows(Sequence):
    """Random access to the windows of a stream, as dicts of int32 [S + 1].

    `tokens`; `segment_ids`, 1, 2, ... for the documents in the window and 0 for padding, which only the last window
    of a stream has; `positions`, which restart at 0 at each document and at the start of the window; `domains`, the
    index of the stream's domain.
    """

    def __init__(self, stream: Stream, seq_len: int, domain: int = 0):
        self._stream = stream
        self._domain = domain
        self._seq_len = seq_len

    def __len__(self) -> int:
        return -(-(len(self._stream.tokens) - 1) // self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        size = self._seq_len + 1
        begin = index * self._seq_len
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        found = self._stream.tokens[begin : begin + size]
        tokens = np.zeros(size, np.int32)
        tokens[: len(found)] = found
        first, last = np.searchsorted(self._stream.starts, (begin + 1, begin + len(found)))
        starts = np.zeros(size, np.int32)
        starts[self._stream.starts[first:last] - begin] = 1
        segment_ids = np.cumsum(starts, dtype=np.int32) + 1
        index_S = np.arange(size, dtype=np.int32)
        positions = index_S - np.maximum.accumulate(index_S * starts)
        segment_ids[len(found) :] = 0
        positions[len(found) :] = 0
        domains = np.full(size, self._domain, np.int32)
        return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "domains": domains}


def frame(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """bos + tokens of `text` + eos, int32."""
    return np.concatenate(([tokenizer.bos], tokenizer.encode(text), [tokenizer.eos])).astype(np.int32)


def pack(texts: list[str], tokenizer: Tokenizer, domain: str) -> Stream:
    """The stream of a few documents, in memory."""
    framed = [frame(tokenizer, text) for text in texts]
    starts = np.cumsum([0, *map(len, framed)], dtype=np.int64)
    return Stream(domain, np.concatenate(framed), starts, sum(len(text.encode()) for text in texts))


def pack_to_disk(
    column: TextColumn, tokenizer: Tokenizer, cache: Path, documents: str, seed: int,
    *, patience: Patience, content: bool,
) -> list[Stream]:  # fmt: skip
    """The streams of all domains of `column`, sorted by domain, read from `cache`; built if not there.

    The documents of a domain are shuffled once by `seed`. `documents` is the fingerprint of what `column` holds. Raises
    DataError if a file is not as long as it was written or, unless `content` is False, has not the same bytes.
    """
    key = hashlib.sha256(f"{FORMAT} {documents} {tokenizer.fingerprint} {seed}".encode()).hexdigest()[:16]
    folder = cache / f"tokens-{key}"
    if not folder.is_dir():
        with building(folder) as temporary:
            _write(column, tokenizer, temporary, seed)
    streams = []
    for index, (domain, num_bytes, *written) in enumerate(_read_index(folder, patience)):
        paths = folder / f"{index}.tokens", folder / f"{index}.starts.npy"
        for path, (size, crc32) in zip(paths, written, strict=True):
            verify(path, Checksums(size, crc32), patience, content=content)
        tokens = TokenFile(paths[0], _dtype(tokenizer), domain, patience)
        starts = np.load(io.BytesIO(patience.read(str(paths[1]), paths[1].read_bytes)))
        streams.append(Stream(domain, tokens, starts, num_bytes))
    return streams


def _read_index(folder: Path, patience: Patience) -> list[Any]:
    """Per domain: its name, bytes of text, and the checksums of its two files."""
    path = folder / INDEX
    try:
        found: list[Any] = json.loads(patience.read(str(path), path.read_text))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {folder} and it is built again") from error
    return found


def _write(column: TextColumn, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
    domains: list[tuple[str, int, Checksums, Checksums]] = []
    for domain, members in column.domains().items():
        # RandomState because numpy promises that its results never change; the cache key has no numpy version.
        order = np.random.RandomState(seed).permutation(members)
        stem = folder / str(len(domains))
        packed, beginnings = stem.with_suffix(".tokens"), stem.with_suffix(".starts.npy")
        starts, num_bytes = [0], 0
        with packed.open("wb") as file:
            for _, text in column.read(order):
                if not text.strip():
                    continue
                tokens = frame(tokenizer, text)
                file.write(tokens.astype(_dtype(tokenizer)).tobytes())
                starts.append(starts[-1] + len(tokens))
                num_bytes += len(text.encode())
        np.save(beginnings, np.array(starts, np.int64))
        if num_bytes:
            domains.append((domain, num_bytes, checksums(packed), checksums(beginnings)))
            logger.info("domain %r: packed %d documents into %.2f M tokens", domain, len(starts) - 1, starts[-1] / 1e6)
    (folder / INDEX).write_text(json.dumps(domains))


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
