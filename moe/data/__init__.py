"""Text in, packed token sequences out: sources, tokenizers, the prepared corpus and the training loader."""

from moe.data.config import DataConfig, check_inputs
from moe.data.corpus import Corpus, Validation, prepare
from moe.data.files import FilesConfig
from moe.data.folder import FolderConfig
from moe.data.loader import TrainLoader
from moe.data.mixture import MixtureConfig
from moe.data.reading import DataError
from moe.data.registered import TfdsConfig
from moe.data.sources import SourceConfig
from moe.data.stdlib import StdlibConfig
from moe.data.tokenizer import ByteConfig, HuggingFaceConfig, SentencePieceConfig, Tokenizer, TokenizerConfig

__all__ = [
    "ByteConfig",
    "Corpus",
    "DataConfig",
    "DataError",
    "FilesConfig",
    "FolderConfig",
    "HuggingFaceConfig",
    "MixtureConfig",
    "SentencePieceConfig",
    "SourceConfig",
    "StdlibConfig",
    "TfdsConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TrainLoader",
    "Validation",
    "check_inputs",
    "prepare",
]
