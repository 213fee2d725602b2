import dataclasses
import shutil

import pytest

from moe.config import ConfigError
from moe.data import DataConfig, FolderConfig, check_inputs, prepare


def problem(path):
    with pytest.raises(ConfigError) as error:
        check_inputs(DataConfig(source=FolderConfig(path=str(path)), cache_dir=str(path) + "-cache"))
    message = str(error.value)
    assert message.startswith(f"data.source.path = {str(path)!r}: ") and "\n" not in message
    assert not path.with_name(path.name + "-cache").exists()
    return message


def test_subfolders_are_domains(texts):
    (texts / "loose.txt").write_text("directly in the folder")
    (texts / "low" / "deep").mkdir()
    (texts / "low" / "deep" / "a.md").write_text("deep")
    (texts / ".hidden").write_bytes(b"\xff")
    (texts / "low" / ".git").mkdir()
    (texts / "low" / ".git" / "x").write_bytes(b"\xff")
    (texts / "low" / "empty.txt").write_text(" \n")
    documents = list(FolderConfig(path=str(texts)).documents("data.source"))
    assert len(documents) == 42
    assert {d.domain for d in documents} == {"low", "high", "texts"}
    assert ("low", "low/deep/a.md", "deep") in documents
    assert ("texts", "loose.txt", "directly in the folder") in documents


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert [d.text for d in FolderConfig(path=str(tmp_path)).documents("data.source")] == ["hello"]


def test_missing(tmp_path):
    assert problem(tmp_path / "absent").endswith("there is no such folder")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert "give the folder" in problem(tmp_path / "a.txt")


def test_empty(tmp_path):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    assert problem(tmp_path / "empty").endswith("has no file to read")
    (tmp_path / "empty" / "blank").write_text("\n\n")
    assert problem(tmp_path / "empty").endswith("all files in this folder are empty")


def test_not_utf8(texts):
    (texts / "low" / "latin.txt").write_bytes("line one\nna\u00efve".encode("latin-1"))
    message = problem(texts)
    assert "latin.txt' is not UTF-8 (byte 0xef in line 2)" in message


def test_unreadable(texts):
    (texts / "low" / "link.txt").symlink_to(texts / "nowhere")
    assert "cannot read" in (message := problem(texts)) and "link.txt" in message and "No such file" in message


def test_not_a_regular_file(texts):
    (texts / "low" / "null").symlink_to("/dev/null")
    assert "null' is not a regular file" in problem(texts)


def test_a_loop_of_links_ends(texts):
    (texts / "low" / "again").symlink_to(texts / "low")
    assert len(list(FolderConfig(path=str(texts)).documents("data.source"))) == 40


def test_fingerprint_is_of_the_content_not_of_the_place(config, texts, tmp_path):
    shutil.copytree(texts, tmp_path / "elsewhere" / "texts")
    moved = FolderConfig(path=str(tmp_path / "elsewhere" / "texts"))
    first = prepare(config)
    assert prepare(dataclasses.replace(config, source=moved)).fingerprint == first.fingerprint
    (texts / "low" / "00.txt").write_text("changed")
    changed = prepare(config)
    assert changed.fingerprint != first.fingerprint
