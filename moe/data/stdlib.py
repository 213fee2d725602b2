"""Real text that every Python brings along: its standard library, in domains that really differ."""

import functools
import hashlib
import importlib.util
import logging
import platform
import re
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.config import ConfigError
from moe.data.documents import Document, DocumentSplits, prepare_documents
from moe.data.python_text import split_code_and_english
from moe.data.sources import SourceConfig

logger = logging.getLogger(__name__)

# Third-party packages, compiled files, and tests, which many installations leave out and which would be 60 % of it.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
TABLE = re.compile(r"^(?:### Decoding Table|decoding_table|decoding_map)", re.MULTILINE)
CHARACTERS_PER_DOCUMENT = 256


@dataclass(frozen=True, kw_only=True)
class StdlibConfig(SourceConfig):
    """The standard library of the running Python; no `domains` means all that the installation has.

    Domains: `code` (modules without docstrings and comments), `english` (docstrings, comments and the help topics),
    `tables` (of the character codecs), `headers` (of the C interface), `names` (of Unicode characters, with their
    properties) and `arithmetic` (worked decimal sums, from the test data of `decimal`).
    """

    domains: tuple[str, ...] = ()
    """Which domains to use; none named: all that the installation has."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if unknown := [name for name in self.domains if name not in DOMAINS]:
            yield "domains", f"{unknown[0]!r} is not one of {', '.join(DOMAINS)}"

    def fingerprint(self, where: str) -> str:
        digest = hashlib.sha256(f"stdlib {self._names()} {unicodedata.unidata_version}".encode())
        for path in sorted({*_modules(), *_headers(), *_sums(), *_topic_files()}):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def documents(self, where: str) -> Iterator[Document]:
        found = set()
        for domain, key, text in self._texts():
            if text.strip():
                found.add(domain)
                yield Document(domain, key, text)
        for domain in self._names():
            if domain not in found:
                logger.info("%s: this Python installation has no text for domain %r, skipped", where, domain)

    def check(self, where: str) -> None:
        """Looks for one document; the installation is not a user's input that could have mistakes."""
        if next(self.documents(where), None) is None:
            raise ConfigError(
                f"{where}.domains = {self.domains!r}: Python {platform.python_version()} here has no text for them; "
                f"choose among {', '.join(DOMAINS)}"
            )

    def open(self, where: str, cache: Path, validation_fraction: float) -> DocumentSplits:
        @functools.cache  # 20 MB, so that three passes over the documents parse the modules once
        def read() -> tuple[Document, ...]:
            return tuple(self.documents(where))

        return prepare_documents(
            lambda: iter(read()),
            content=self.fingerprint(where),
            where=where,
            cache=cache,
            validation_fraction=validation_fraction,
        )

    def _names(self) -> tuple[str, ...]:
        return self.domains or DOMAINS

    def _texts(self) -> Iterator[tuple[str, str, str]]:
        names = self._names()
        if "code" in names or "english" in names:
            for key, code, english in _split_modules():
                yield from ((name, key, text) for name, text in (("code", code), ("english", english)) if name in names)
        for name, reader in READERS.items():
            if name in names:
                yield from ((name, key, text) for key, text in reader())


def _topics() -> Iterator[tuple[str, str]]:
    if importlib.util.find_spec("pydoc_data.topics"):
        topics = importlib.import_module("pydoc_data.topics").topics
        yield from ((f"topic {name}", topics[name]) for name in sorted(topics))


def _tables() -> Iterator[tuple[str, str]]:
    for path in _modules():
        if table := _table(path):
            yield path.name, table


def _header_texts() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("include"))
    return ((path.relative_to(root).as_posix(), path.read_text("utf-8", "replace")) for path in _headers())


def _sum_texts() -> Iterator[tuple[str, str]]:
    return ((path.name, path.read_text("utf-8", "replace")) for path in _sums())


def _names() -> Iterator[tuple[str, str]]:
    for start in range(0, 0x110000, CHARACTERS_PER_DOCUMENT):
        lines = [_character(code) for code in range(start, start + CHARACTERS_PER_DOCUMENT)]
        yield f"U+{start:04X}", "".join(lines)


READERS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "english": _topics,
    "tables": _tables,
    "headers": _header_texts,
    "names": _names,
    "arithmetic": _sum_texts,
}
DOMAINS = ("code", *READERS)


def _character(code: int) -> str:
    character = chr(code)
    name = unicodedata.name(character, "")
    if not name or name.endswith(f"{code:04X}"):  # 90,000 ideographs are named by their number
        return ""
    line = f"U+{code:04X} {character} {name}; category {unicodedata.category(character)}"
    line += f"; bidirectional {unicodedata.bidirectional(character)}"
    if decomposition := unicodedata.decomposition(character):
        line += f"; decomposition {decomposition}"
    return line + "\n"


def _split_modules() -> Iterator[tuple[str, str, str]]:
    """(key, code, English) of every module that is not a table."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _modules():
        if not _table(path):
            try:
                with tokenize.open(path) as file:
                    source = file.read()
                code, english = split_code_and_english(source)
            except (SyntaxError, UnicodeDecodeError) as error:  # templates and the like, which are no modules
                logger.info("%s: not Python source (%s), skipped", path.name, error)
                continue
            yield path.relative_to(root).as_posix(), code, english


def _table(path: Path) -> str:
    """The mapping table of a module of `encodings`, empty if it has none."""
    if path.parent.name != "encodings":
        return ""
    text = path.read_text("utf-8", "replace")
    match = TABLE.search(text)
    return text[match.start() :] if match else ""


def _modules() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))


def _headers() -> list[Path]:
    return sorted(Path(sysconfig.get_path("include")).rglob("*.h"))


def _sums() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"), "test")
    return sorted([*root.glob("decimaltestdata/*.decTest"), *root.glob("test_decimal/**/*.decTest")])


def _topic_files() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib"), "pydoc_data").glob("*.py"))
