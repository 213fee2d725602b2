import json
import re

import pytest

from moe.config import ConfigError
from moe.data import DataConfig, FilesConfig, check_inputs, prepare


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def problem(tmp_path, **source):
    with pytest.raises(ConfigError) as error:
        check_inputs(DataConfig(source=FilesConfig(**source), cache_dir=str(tmp_path / "cache")))
    message = str(error.value)
    assert message.startswith("data.source.") and "\n" not in message
    assert not (tmp_path / "cache").exists()
    return message


def test_jsonl_with_domains(tmp_path):
    records = [{"body": f"text {i}", "kind": "ab"[i % 2]} for i in range(20)] + [{"body": "", "kind": "c"}]
    source = FilesConfig(paths=(jsonl(tmp_path / "x.jsonl", records),), text_field="body", domain_field="kind")
    documents = list(source.documents("data.source"))
    assert [(d.domain, d.text) for d in documents] == [("ab"[i % 2], f"text {i}") for i in range(20)]
    corpus = prepare(DataConfig(source=source, cache_dir=str(tmp_path / "cache"), seq_len=8))
    assert corpus.domains == ("a", "b")


def test_parquet_is_the_same_as_jsonl(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"text": f"text {i} é", "domain": "ab"[i % 2], "n": i} for i in range(3000)]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "x.parquet")
    lines = jsonl(tmp_path / "x.jsonl", records)
    for domain_field in (None, "domain"):
        sources = [FilesConfig(paths=(p,), domain_field=domain_field) for p in (lines, str(tmp_path / "x.parquet"))]
        a, b = (list(source.documents("data.source")) for source in sources)
        assert a == b and len(a) == 3000
    assert {d.domain for d in FilesConfig(paths=(lines,)).documents("data.source")} == {"x"}


def test_shards_form_one_domain_and_keys_are_unique(tmp_path):
    (tmp_path / "sub").mkdir()
    paths = tuple(jsonl(tmp_path / name, [{"text": "a"}, {"text": "b"}]) for name in ("x.jsonl", "sub/x.jsonl"))
    documents = list(FilesConfig(paths=paths).documents("data.source"))
    assert {d.domain for d in documents} == {"x"}
    assert len({d.key for d in documents}) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "x.jsonl': line 3 is not JSON"),
        (b"[1, 2]", "line 3 is a JSON list, not an object"),
        (b'{"body": "a"}', "text_field = 'text': there is no such field in line 3 of .*; it has body"),
        (b'{"text": 7}', "text_field = 'text': is a int, not a string, in line 3"),
        (b'{"text": null}', "text_field = 'text': is a NoneType, not a string, in line 3"),
        (b'{"text": "\xff"}', r"x.jsonl' is not UTF-8 \(byte 0xff in line 3\)"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair, which is no text, in line 3"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    assert re.search(message, problem(tmp_path, paths=(str(tmp_path / "x.jsonl"),)))


def test_bad_files(tmp_path):
    assert "paths.0 = " in (m := problem(tmp_path, paths=(str(tmp_path / "absent.jsonl"),))) and "No such file" in m
    (tmp_path / "folder.jsonl").mkdir()
    assert "is not a regular file" in problem(tmp_path, paths=(str(tmp_path / "folder.jsonl"),))
    assert "does not end in .jsonl or .parquet" in problem(tmp_path, paths=("x.csv",))
    assert "at least one" in problem(tmp_path, paths=())
    assert "no document with any text" in problem(tmp_path, paths=(jsonl(tmp_path / "e.jsonl", [{"text": " "}]),))


def test_bad_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "is not a Parquet file" in problem(tmp_path, paths=(str(tmp_path / "x.parquet"),))
    parquet.write_table(arrow.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "y.parquet")
    path = (str(tmp_path / "y.parquet"),)
    assert "NoneType, not a string, in row 2 of" in problem(tmp_path, paths=path)
    assert "no such field in row 1" in problem(tmp_path, paths=path, text_field="body")
