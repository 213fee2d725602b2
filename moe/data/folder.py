"""A folder of a user's text files: every subfolder is a domain."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.config import ConfigError
from moe.data.documents import Document
from moe.data.sources import SourceConfig


@dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """Each file below `path` is a UTF-8 document; the first subfolder on the way to it names its domain.

    Files directly in `path` form one domain named after it. Hidden files and folders (`.name`) and empty files are
    left out.
    """

    path: str
    """Folder of UTF-8 text files; every subfolder is a domain."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.path:
            yield "path", "must name a folder of text files"

    def fingerprint(self, where: str) -> str:
        digest = hashlib.sha256(b"folder")
        for domain, key, path in self._files(where):
            content = path.read_bytes()
            digest.update(f"\0{domain}\0{key}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def documents(self, where: str) -> Iterator[Document]:
        what = f"{where}.path = {self.path!r}"
        for domain, key, path in self._files(where):
            text = decode(path.read_bytes(), path, what)
            if text.strip():
                yield Document(domain, key, text)

    def check(self, where: str) -> None:
        if not sum(1 for _ in self.documents(where)):
            raise ConfigError(f"{where}.path = {self.path!r}: all files in this folder are empty")

    def _files(self, where: str) -> Iterator[tuple[str, str, Path]]:
        """(domain, key, path) of every file, sorted by key."""
        what = f"{where}.path = {self.path!r}"
        root = Path(self.path).expanduser()
        if not root.exists():
            raise ConfigError(f"{what}: there is no such folder")
        if not root.is_dir():
            raise ConfigError(f"{what}: is a file; give the folder that holds it")
        found = []
        for path in _walk(root, what):
            require_file(path, what)
            parts = path.relative_to(root).parts
            domain = parts[0] if len(parts) > 1 else root.resolve().name
            found.append((domain, "/".join(parts), path))
        if not found:
            raise ConfigError(f"{what}: the folder has no file to read")
        yield from sorted(found)


def require_file(path: Path, what: str) -> None:
    """Raises ConfigError that begins with `what` unless `path` is a regular file that can be opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{what}: {str(path)!r} is not a regular file")
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {str(path)!r} ({error.strerror})") from error


def decode(content: bytes, path: Path, what: str, first_line: int = 1) -> str:
    """`content` as UTF-8 without a byte order mark; raises ConfigError that begins with `what` and names the line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise ConfigError(
            f"{what}: {str(path)!r} is not UTF-8 (byte 0x{byte:02x} in line {line}); convert it or move it away"
        ) from error


def _walk(root: Path, what: str) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise ConfigError(f"{what}: cannot read {error.filename!r} ({error.strerror})") from error

    seen = set()  # links to folders are followed, but each folder is read once
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
