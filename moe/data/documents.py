"""Documents, their train and validation split, and the TFDS dataset that holds them as ArrayRecord."""

import hashlib
import io
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from moe.config import ConfigError
from moe.data.reading import DataError, Patience

logger = logging.getLogger(__name__)

DATASET = "moe_documents"
FORMAT = 1  # part of every cache key: raise it when documents or their split are made in another way

Read = Callable[[], Iterator["Document"]]


class Document(NamedTuple):
    """A text with the domain it belongs to and a key that is unique within its source."""

    domain: str
    key: str
    text: str


@dataclass(frozen=True)
class TextColumn:
    """A TFDS data source seen as (domain, text) by index. `domain` is a fixed name if there is no such feature."""

    source: Any
    text_field: str
    domain: str | None = None
    place: str = ""
    again: str = ""
    """Where it lies and how it is made again, for the error message."""
    patience: Patience = Patience()

    def __len__(self) -> int:
        return len(self.source)

    def domains(self) -> dict[str, np.ndarray]:
        """The records of each domain, int64, domains sorted."""
        if self.domain is not None:
            return {self.domain: np.arange(len(self))}
        members = defaultdict(list)
        for index, (domain, _) in enumerate(self.read(range(len(self)))):
            members[domain].append(index)
        return {domain: np.array(members[domain]) for domain in sorted(members)}

    def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[str, str]]:
        """(domain, text) of the records at `indices`, read in chunks of 256; DataError if they cannot be read."""
        for start in range(0, len(indices), 256):
            records = self._records([int(i) for i in indices[start : start + 256]])
            for record in records:
                yield self.domain or record["domain"].decode(), record[self.text_field].decode(errors="replace")

    def _records(self, indices: list[int]) -> list[Any]:
        def attempt() -> list[Any]:
            found: list[Any] = self.source.__getitems__(indices)
            if any(record[self.text_field] is None for record in found):  # what a file that was cut short gives
                raise OSError("the file ends too early")
            return found

        try:  # Riegeli's own checksums raise RuntimeError
            return self.patience.read(self.place, attempt, RuntimeError)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.place}: cannot be read ({str(error).splitlines()[0]}); {self.again}") from error


class DocumentSplits(NamedTuple):
    """The two splits of a source; `fingerprint` names what is in them and how it was split."""

    fingerprint: str
    train: TextColumn
    validation: TextColumn


def prepare_documents(
    read: Read, *, content: str, where: str, cache: Path, validation_fraction: float
) -> DocumentSplits:
    """Splits the documents that `read` yields, builds a TFDS dataset of them in `cache` unless it is there, opens it.

    `content` is the fingerprint of what `read` yields. Raises ConfigError about `where` if there is no document.
    """
    fingerprint = hashlib.sha256(f"{FORMAT} {content} {validation_fraction!r}".encode()).hexdigest()[:16]
    folder = cache / f"documents-{fingerprint}"
    if not folder.is_dir():
        logger.info("%s: building the dataset in %s", where, folder)
        with building(folder) as temporary:
            _build(read, temporary, where, validation_fraction)
    again = "delete it and it is built again"
    try:
        with quiet():
            sources = [tfds.data_source(DATASET, data_dir=folder, split=split) for split in ("train", "validation")]
    except (OSError, RuntimeError, ValueError, LookupError, tfds.core.DatasetNotFoundError) as error:
        raise DataError(f"{folder}: cannot be opened ({str(error).strip().splitlines()[0]}); {again}") from error
    train, validation = (TextColumn(source, "text", place=str(folder), again=again) for source in sources)
    return DocumentSplits(fingerprint, train, validation)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it in one rename at the end.

    A build that dies leaves a `.building-*` folder that nobody reads; of two processes that build at the same time
    the first one wins and the other's identical result is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".building-{folder.name}-", dir=folder.parent) as private:
        temporary = Path(private, folder.name)  # has the permissions the user's umask gives, `private` has not
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


@contextmanager
def quiet() -> Iterator[None]:
    """Without TFDS's progress bars and its own account of what it does; ours is one line per domain."""
    absl = logging.getLogger("absl")
    level = absl.level
    tfds.disable_progress_bar()
    absl.setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)
        tfds.enable_progress_bar()


def validation_keys(keys: dict[str, list[str]], fraction: float) -> dict[str, set[str]]:
    """For each domain the keys to hold out: those whose hash falls below `fraction`.

    At least one and not all of a domain's keys, so a domain of a single document holds out none.
    """
    held_out = {}
    for domain, names in keys.items():
        ranks = sorted((_unit_hash(domain, name), name) for name in names)
        count = sum(rank < fraction for rank, _ in ranks)
        held_out[domain] = {name for _, name in ranks[: min(max(count, 1), len(ranks) - 1)]}
    return held_out


def cut(text: str, fraction: float) -> tuple[str, str]:
    """`text` in two, the second part being about `fraction` of it; cut behind a line end or a blank if there is one."""
    at = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    for mark in ("\n", " "):
        end = text.rfind(mark, at // 2, at) + 1
        if end:
            return text[:end], text[end:]
    return text[:at], text[at:]


def _build(read: Read, data_dir: Path, where: str, fraction: float) -> None:
    keys: dict[str, list[str]] = defaultdict(list)
    num_bytes: dict[str, int] = defaultdict(int)
    for document in read():
        keys[document.domain].append(document.key)
        num_bytes[document.domain] += len(document.text.encode())
    if not keys:
        raise ConfigError(f"{where}: has no document with any text")
    for domain in keys:
        size = num_bytes[domain] / 1e6
        logger.info("%s: domain %r: %d documents, %.2f MB", where, domain, len(keys[domain]), size)
    held_out = validation_keys(keys, fraction)

    def split(validation: bool) -> Iterator[Document]:
        for document in read():
            if len(keys[document.domain]) == 1:
                yield document._replace(text=cut(document.text, fraction)[validation])
            elif (document.key in held_out[document.domain]) == validation:
                yield document

    builder = _Builder(split, data_dir=data_dir, file_format="array_record")
    with quiet():
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    shutil.rmtree(data_dir / "downloads", ignore_errors=True)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Documents in the order they are yielded."""

    name = DATASET
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, split: Callable[[bool], Iterator[Document]], **kwargs: Any):
        self._split = split
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text documents with a domain and a key.",
            disable_shuffling=True,
            features=tfds.features.FeaturesDict({"domain": text, "key": text, "text": text}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable]:
        return {"train": self._generate_examples(False), "validation": self._generate_examples(True)}

    def _generate_examples(self, validation: bool) -> Iterator[tuple[int, dict[str, str]]]:
        for index, document in enumerate(self._split(validation)):
            yield index, document._asdict()


def _unit_hash(domain: str, key: str) -> float:
    digest = hashlib.sha256(f"{domain}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
