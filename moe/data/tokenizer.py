"""Tokenizers: bytes by default, a Hugging Face `tokenizer.json` or a SentencePiece model by path.

The libraries behind the last two are imported when they are needed and not before.
"""

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from moe.config import ConfigError

# A tokenizer.json does not say which of its tokens begin and end a document; these are the names in use.
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")


class Tokenizer:
    """Text to token ids and back.

    Attributes: `vocab_size` counts every id, specials included; `bos` and `eos` are the ids that begin and end a
    document; `fingerprint` is 16 hexadecimal digits that change whenever the ids of some text do.
    """

    vocab_size: int
    bos: int
    eos: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids int32 [n], without bos and eos."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bos and eos are dropped, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Base of the tokenizer configs."""

    def build(self, where: str = "data.tokenizer") -> Tokenizer:
        """The tokenizer. Raises ConfigError, naming the config path `where`, if its file or library is not there."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ByteConfig(TokenizerConfig):
    """One token per UTF-8 byte."""

    def build(self, where: str = "data.tokenizer") -> Tokenizer:
        return ByteTokenizer()


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(TokenizerConfig):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    path: str
    """The `tokenizer.json`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.path:
            yield "path", "must name a tokenizer.json"

    def build(self, where: str = "data.tokenizer") -> Tokenizer:
        return HuggingFaceTokenizer(self.path, where)


@dataclass(frozen=True, kw_only=True)
class SentencePieceConfig(TokenizerConfig):
    """A SentencePiece model file."""

    path: str
    """The model file."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.path:
            yield "path", "must name a SentencePiece model"

    def build(self, where: str = "data.tokenizer") -> Tokenizer:
        return SentencePieceTokenizer(self.path, where)


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes, 256 begins and 257 ends a document."""

    vocab_size = 258
    bos = 256
    eos = 257
    fingerprint = hashlib.sha256(b"bytes, bos 256, eos 257").hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in _ints(ids) if i < 256).decode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """Wraps `tokenizers.Tokenizer`.

    bos and eos are those of a `tokenizer_config.json` beside the file, else a token with one of the usual names
    (`BOS_NAMES`, `EOS_NAMES`), else ids appended after the vocabulary.
    """

    def __init__(self, path: str, where: str):
        content = _read(path, where)
        library = import_extra("tokenizers", f"{where}.path = {path!r}")
        try:
            self._model = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises a bare Exception for a file it cannot parse
            raise ConfigError(f"{where}.path = {path!r}: is not a tokenizer.json ({error})") from error
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        special = _special_tokens(Path(path).expanduser().with_name("tokenizer_config.json"))
        bos = next((vocabulary[name] for name in (special.get("bos_token"), *BOS_NAMES) if name in vocabulary), None)
        eos = next((vocabulary[name] for name in (special.get("eos_token"), *EOS_NAMES) if name in vocabulary), None)
        self._model_size = max(vocabulary.values()) + 1
        self.bos, self.eos, self.vocab_size = _append_missing(bos, eos, self._model_size)
        self.fingerprint = _fingerprint(content, self.bos, self.eos)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in _ints(ids) if i < self._model_size and i not in (self.bos, self.eos)]
        return self._model.decode(kept, skip_special_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """Wraps `sentencepiece.SentencePieceProcessor`; bos and eos that the model lacks are appended."""

    def __init__(self, path: str, where: str):
        content = _read(path, where)
        library = import_extra("sentencepiece", f"{where}.path = {path!r}")
        try:
            self._model = library.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ConfigError(f"{where}.path = {path!r}: is not a SentencePiece model ({error})") from error
        self._model_size = self._model.get_piece_size()
        bos, eos = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self.bos, self.eos, self.vocab_size = _append_missing(bos, eos, self._model_size)
        self.fingerprint = _fingerprint(content, self.bos, self.eos)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, out_type=int), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in _ints(ids) if i < self._model_size and i not in (self.bos, self.eos)])


def import_extra(module: str, what: str) -> ModuleType:
    """The optional library `module`; raises ConfigError that begins with `what` and says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f'{what}: needs the library {module!r}; pip install "moe[hf]"') from error


def _read(path: str, where: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}.path = {path!r}: cannot be read ({error.strerror})") from error


def _ints(ids: Iterable[int]) -> list[int]:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).ravel().tolist()


def _special_tokens(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text())
    tokens = {key: entries.get(key) for key in ("bos_token", "eos_token")}
    return {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items() if token}


def _append_missing(bos: int | None, eos: int | None, size: int) -> tuple[int, int, int]:
    if bos is None:
        bos, size = size, size + 1
    if eos is None:
        eos, size = size, size + 1
    return bos, eos, size


def _fingerprint(content: bytes, bos: int, eos: int) -> str:
    return hashlib.sha256(content + f"bos {bos}, eos {eos}".encode()).hexdigest()[:16]
