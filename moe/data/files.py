"""Files of documents: JSON lines and Parquet."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import ConfigError
from moe.data.documents import Document
from moe.data.folder import decode, require_file
from moe.data.sources import SourceConfig
from moe.data.tokenizer import import_extra

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class FilesConfig(SourceConfig):
    """One document per line of a `.jsonl` file or row of a `.parquet` file, its text in `text_field`.

    `domain_field` names the domain of each document; without it all files form one domain named after the first.
    Documents without text are left out.
    """

    paths: tuple[str, ...]
    """Files, `.jsonl` or `.parquet`."""
    text_field: str = "text"
    """Field or column that holds the text."""
    domain_field: str | None = None
    """Field or column that names the domain; None: all documents are one domain."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.paths:
            yield "paths", "must name at least one file"
        if bad := [path for path in self.paths if Path(path).suffix not in SUFFIXES]:
            yield "paths", f"{bad[0]!r} does not end in {' or '.join(SUFFIXES)}"
        if not self.text_field:
            yield "text_field", "must name a field"
        if self.domain_field == "":
            yield "domain_field", "must name a field, or be None for a single domain"

    def fingerprint(self, where: str) -> str:
        digest = hashlib.sha256(f"files {self.text_field!r} {self.domain_field!r}".encode())
        for index, path in enumerate(self._files(where)):
            digest.update(f"\0{path.stem if index == 0 else ''}\0{path.suffix}".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def documents(self, where: str) -> Iterator[Document]:
        files = self._files(where)
        for index, path in enumerate(files):
            records = _json_lines if path.suffix == ".jsonl" else _parquet_rows
            for number, place, record in records(
                path, f"{where}.paths.{index} = {self.paths[index]!r}", self._fields()
            ):
                text = _string(record, self.text_field, f"{where}.text_field", place)
                domain = files[0].stem
                if self.domain_field is not None:
                    domain = _string(record, self.domain_field, f"{where}.domain_field", place)
                if text.strip():
                    yield Document(domain, f"{index}:{number}", text)

    def check(self, where: str) -> None:
        if not sum(1 for _ in self.documents(where)):
            raise ConfigError(f"{where}.paths = {self.paths!r}: the files have no document with any text")

    def _fields(self) -> list[str]:
        return [self.text_field] + ([] if self.domain_field is None else [self.domain_field])

    def _files(self, where: str) -> list[Path]:
        files = [Path(path).expanduser() for path in self.paths]
        for index, path in enumerate(files):
            require_file(path, f"{where}.paths.{index} = {self.paths[index]!r}")
        return files


Record = tuple[int, str, dict[str, Any]]  # number from 1, place for error messages, fields


def _json_lines(path: Path, what: str, fields: list[str]) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"line {number} of {str(path)!r}"
            try:
                record = json.loads(decode(line, path, what, number))
            except ValueError as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{what}: line {number} is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{what}: line {number} is a JSON {type(record).__name__}, not an object")
            yield number, place, record


def _parquet_rows(path: Path, what: str, fields: list[str]) -> Iterator[Record]:
    arrow = import_extra("pyarrow", what)
    parquet = import_extra("pyarrow.parquet", what)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in fields if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for record in batch.to_pylist():
                    number += 1
                    yield number, f"row {number} of {str(path)!r}", record
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"{what}: is not a Parquet file ({error})") from error


def _string(record: dict[str, Any], field: str, where: str, place: str) -> str:
    if field not in record:
        known = ", ".join(sorted(map(str, record))) or "no text field"
        raise ConfigError(f"{where} = {field!r}: there is no such field in {place}; it has {known}")
    value = record[field]
    if not isinstance(value, str):
        raise ConfigError(f"{where} = {field!r}: is a {type(value).__name__}, not a string, in {place}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} = {field!r}: has half a surrogate pair, which is no text, in {place}") from error
    return value
