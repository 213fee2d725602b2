"""A small folder of text in two domains, and the standard library prepared once."""

from pathlib import Path

import pytest

from moe.data import DataConfig, FolderConfig, StdlibConfig, prepare


def write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def texts(tmp_path):
    """20 documents of 70 to 89 bytes in each of two domains, which differ in their letters."""
    root = tmp_path / "texts"
    write(root, {f"low/{i:02}.txt": "abcdefghij" * 7 + "x" * i for i in range(20)})
    write(root, {f"high/{i:02}.txt": "QRSTUVWXYZ" * 7 + "!" * i for i in range(20)})
    return root


@pytest.fixture
def config(texts, tmp_path):
    return DataConfig(
        source=FolderConfig(path=str(texts)), seq_len=16, cache_dir=str(tmp_path / "cache"), validation_fraction=0.2
    )


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory):
    return prepare(DataConfig(source=StdlibConfig(), cache_dir=str(tmp_path_factory.mktemp("stdlib"))))
