"""What a source of text is: documents with a domain and a key, or a TFDS dataset that is already prepared."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe.data.documents import Document, DocumentSplits, prepare_documents


class Leaf(NamedTuple):
    """One source of a mixture that is no mixture itself, with its share of the training sequences."""

    where: str  # config path, for error messages
    source: "SourceConfig"
    weight: float


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Base of the sources of text. A new kind of source is one file with `fingerprint` and `documents`."""

    def fingerprint(self, where: str) -> str:
        """Changes with the content and the options, not with the place. Raises ConfigError about `where`."""
        raise NotImplementedError

    def documents(self, where: str) -> Iterator[Document]:
        """Every document, in the same order each time, one domain after the other or mixed.

        Raises ConfigError about the config path `where` for input that cannot be read.
        """
        raise NotImplementedError

    def check(self, where: str) -> None:
        """Raises ConfigError if `documents` would; writes nothing."""
        for _ in self.documents(where):
            pass

    def open(self, where: str, cache: Path, validation_fraction: float) -> DocumentSplits:
        """The train and validation documents, prepared into `cache` by TFDS on the first call."""
        return prepare_documents(
            lambda: self.documents(where),
            content=self.fingerprint(where),
            where=where,
            cache=cache,
            validation_fraction=validation_fraction,
        )

    def leaves(self, where: str, weight: float = 1.0) -> Iterator[Leaf]:
        """The sources to read, depth first; their weights sum to `weight`."""
        yield Leaf(where, self, weight)
