import json
import struct
import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from launch.data import main
from moe.data.documents import Document, prepare_documents


@pytest.fixture
def tfrecord_dataset(tmp_path):
    """The folder of a dataset stored as TFRecord; its texts are `text 0` to `text 19`."""
    documents = [Document("a", f"{i}", f"text {i}") for i in range(20)]
    prepare_documents(
        lambda: iter(documents), content="x", where="s", cache=tmp_path / "cache", validation_fraction=0.3
    )
    [folder] = (tmp_path / "cache").glob("documents-*/moe_documents/1.0.0")
    for path in folder.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        framed = [struct.pack(f"<QI{len(r)}sI", len(r), 0, r, 0) for r in records]  # the checksums are not read
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(framed))
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    return folder


def test_convert(tfrecord_dataset, tmp_path, capsys):
    assert main(["convert", "--source", str(tfrecord_dataset), "--data-dir", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "moe_documents" / "1.0.0")
    texts = []
    for split in ("train", "validation"):
        source = tfds.data_source("moe_documents:1.0.0", data_dir=tmp_path / "new", split=split)
        texts += [source[i]["text"].decode() for i in range(len(source))]
    assert sorted(texts) == sorted(f"text {i}" for i in range(20))
    assert main(["convert", "--source", str(tfrecord_dataset), "--data-dir", str(tmp_path / "new")]) == 2
    assert "has moe_documents/1.0.0 already" in capsys.readouterr().err
    assert "tensorflow" not in sys.modules


def test_convert_leaves_nothing_behind_when_records_are_missing(tfrecord_dataset, tmp_path, capsys):
    [path] = tfrecord_dataset.glob("*train.tfrecord*")
    path.write_bytes(b"")
    assert main(["convert", "--source", str(tfrecord_dataset), "--data-dir", str(tmp_path / "new")]) == 2
    assert "has 0 records instead of" in capsys.readouterr().err
    assert not (tmp_path / "new" / "moe_documents" / "1.0.0").exists()


def test_convert_refuses_other_folders(tmp_path, capsys):
    assert main(["convert", "--source", str(tmp_path), "--data-dir", str(tmp_path / "new")]) == 2
    assert "has no dataset_info.json" in capsys.readouterr().err


def test_describe(texts, tmp_path, capsys):
    arguments = ["describe", "--folder", str(texts), "--cache-dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["high", "low", "fingerprint"]
    assert "QRSTUVWXYZ" in lines[1] and "abcdefghij" in lines[2]


def test_a_harmed_cache_is_answered_in_one_line(texts, tmp_path, capsys):
    arguments = ["describe", "--folder", str(texts), "--cache-dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    capsys.readouterr()
    [packed] = (tmp_path / "cache").rglob("1.tokens")
    packed.write_bytes(packed.read_bytes()[:-1])
    assert main(arguments) == 74
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(str(packed)) and line.endswith("and it is built again")


def test_describe_answers_mistakes_in_one_line(tmp_path, capsys):
    assert main(["describe", "--folder", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["describe", "--folder", "x", "--dataset", "lm1b"]) == 2
    assert "give one of" in capsys.readouterr().err
