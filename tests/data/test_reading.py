"""Files of the cache that are cut short, changed, gone or cannot be read: one error with a name, never other data."""

import dataclasses
import errno
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe.data import DataConfig, DataError, TrainLoader, prepare
from moe.data import reading as module
from moe.data.reading import Patience, TokenFile, checksums, verify


@pytest.fixture
def config(config: DataConfig) -> DataConfig:
    """Prepared once, with no time between retries."""
    config = dataclasses.replace(config, read_backoff_s=0.0, read_retries=2)
    prepare(config)
    return config


def file(config: DataConfig, pattern: str) -> Path:
    [found] = Path(config.cache_dir).rglob(pattern)
    return found


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize("name", ["1.tokens", "1.starts.npy"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: flip(path, 150), r"bytes 0 to \d+ are not what was written"),
        (lambda path: cut(path, 120), r"has 120 bytes, but \d+ were written"),
        (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
    ],
    ids=["flipped", "cut", "gone"],
)
def test_a_harmed_packed_file_is_named_at_opening_and_can_be_built_again(config, name, harm, said):
    before = [prepare(config).train_dataset(0)[i]["tokens"] for i in range(40)]
    path = file(config, name)
    harm(path)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {said}; delete .* and it is built again") as error:
        prepare(config)
    assert "\n" not in str(error.value)
    shutil.rmtree(re.search("delete (.*) and it", str(error.value))[1])
    again = prepare(config).train_dataset(0)
    assert all((again[i]["tokens"] == tokens).all() for i, tokens in enumerate(before))


def test_without_verify_only_lengths_are_compared(config):
    path = file(config, "0.tokens")
    flip(path, 100)
    config = dataclasses.replace(config, verify=False)
    prepare(config)
    cut(path, 100)
    with pytest.raises(DataError, match="has 100 bytes"):
        prepare(config)


def test_every_piece_has_a_checksum_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    path = tmp_path / "x"
    path.write_bytes(bytes(250))
    written = checksums(path)
    assert len(written.crc32) == 3 and written.num_bytes == 250
    verify(path, written, Patience(), content=True)
    flip(path, 249)
    with pytest.raises(DataError, match="bytes 200 to 250 are not"):
        verify(path, written, Patience(), content=True)


def test_a_harmed_index_is_named(config):
    file(config, "domains.json").write_text('[["low", 1')
    with pytest.raises(DataError, match=r"domains.json: cannot be read .* delete .*tokens-\w+ and it is built again"):
        prepare(config)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: flip(path, 200), "hash mismatch"),
        (lambda path: cut(path, path.stat().st_size // 2), "the file ends too early"),
        (lambda path: cut(path, 0), "at least 64KB"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["flipped", "cut", "empty", "gone"],
)
def test_a_harmed_file_of_documents_is_named(config, harm, said):
    harm(file(config, "*validation.array_record*"))
    with pytest.raises(DataError, match=f"documents-.*cannot be .*{said}.*; delete it and it is built again"):
        prepare(config)


def test_documents_without_their_description_are_named(config):
    file(config, "dataset_info.json").unlink()
    with pytest.raises(DataError, match=r"documents-.*: cannot be opened .*; delete it"):
        prepare(config)


def test_a_file_cut_while_it_is_read_names_file_domain_and_step_through_the_threads(config):
    for threads in (0, 2):
        loader = TrainLoader(
            prepare(config), accumulation=1, batch_size=2, rows=[0, 1], seed=0, num_threads=threads, prefetch=1
        )
        next(loader)
        kept = {path: path.read_bytes() for path in Path(config.cache_dir).rglob("*.tokens")}
        for path in kept:
            cut(path, 10)
        said = (
            r"the batch of data step \d+: .*/[01].tokens \(domain '(low|high)'\): ends after 10 bytes, \d+ when it was"
        )
        with pytest.raises(DataError, match=said):
            for _ in range(10):
                next(loader)
        loader.close()
        for path, content in kept.items():
            path.write_bytes(content)


def test_a_fault_that_passes_is_tried_again_and_counted(config, monkeypatch, caplog):
    expected = [prepare(config).train_dataset(0)[i]["tokens"] for i in range(20)]
    corpus, pread, faults = prepare(config), os.pread, []

    def failing(file: int, size: int, offset: int) -> bytes:
        faults.append(offset)
        if len(faults) % 3:  # two of three reads fail: the first and its first retry
            raise OSError(errno.EIO, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with caplog.at_level(logging.WARNING):
        found = [corpus.train_dataset(0)[i]["tokens"] for i in range(20)]
    assert all((a == b).all() for a, b in zip(found, expected, strict=True)) and len(faults) == 60
    assert "Input/output error); retry 1 of 2 in 0 s" in caplog.text and "retry 2 of 2" not in caplog.text
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(DataError, match="Input/output error; unless the disk is to blame, delete"):
        corpus.train_dataset(0)[0]


def test_retries_wait_twice_as_long_each_time(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        Patience(3, 0.5).read("x", fail)
    assert waits == [0.5, 1.0, 2.0]


def test_a_full_disk_while_packing_is_named_and_leaves_nothing(config, monkeypatch):
    shutil.rmtree(file(config, "1.tokens").parent)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"No space left on device; nothing half-made is left in data.cache_dir"):
        prepare(config)
    assert not list(Path(config.cache_dir).glob("*tokens*")) and not list(Path(config.cache_dir).glob(".building*"))


def test_a_short_read_is_completed(tmp_path, monkeypatch):
    path = tmp_path / "x.tokens"
    np.arange(1000, dtype=np.uint16).tofile(path)
    tokens, pread = TokenFile(path, np.uint16, "x", Patience()), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 300), offset))
    assert len(tokens) == 1000 and (tokens[3:990] == np.arange(3, 990)).all() and len(tokens[998:1200]) == 2
