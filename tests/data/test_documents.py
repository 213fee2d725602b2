from pathlib import Path

import pytest

from moe.data.documents import Document, building, cut, prepare_documents, validation_keys


def prepare(documents, cache, fraction=0.2, content="content"):
    return prepare_documents(
        lambda: iter(documents), content=content, where="data.source", cache=cache, validation_fraction=fraction
    )


def rows(column):
    return list(column.read(range(len(column))))


def test_split_is_disjoint_complete_and_by_document(tmp_path):
    documents = [Document(domain, f"{i}.txt", f"{domain} {i}") for domain in "ab" for i in range(30)]
    splits = prepare(documents, tmp_path)
    train, validation = rows(splits.train), rows(splits.validation)
    assert sorted(train + validation) == sorted((d.domain, d.text) for d in documents)
    assert {domain for domain, _ in validation} == {"a", "b"}
    assert 3 <= len(validation) <= 21  # 12 expected, three standard deviations


def test_split_of_a_document_does_not_depend_on_the_others():
    few = validation_keys({"a": [f"{i}" for i in range(100)]}, 0.2)["a"]
    many = validation_keys({"a": [f"{i}" for i in range(200)]}, 0.2)["a"]
    assert few == {key for key in many if int(key) < 100}


@pytest.mark.parametrize("fraction", [1e-9, 0.5])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_two_documents_are_enough_for_both_splits(count, fraction):
    for trial in range(20):
        held_out = validation_keys({"a": [f"{trial} {i}" for i in range(count)]}, fraction)["a"]
        assert 1 <= len(held_out) < count


def test_a_single_document_is_cut_by_position(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    splits = prepare([Document("a", "only.txt", text)], tmp_path, fraction=0.1)
    [(_, train)], [(_, validation)] = rows(splits.train), rows(splits.validation)
    assert train + validation == text
    assert train.endswith("\n") and 0.05 < len(validation) / len(text) < 0.2


def test_cut_leaves_nothing_empty():
    assert cut("ab", 0.01) == ("a", "b")
    assert cut("one two", 0.3) == ("one ", "two")


def test_the_second_call_reads_the_cache(tmp_path):
    documents = [Document("a", str(i), f"text {i}") for i in range(5)]
    first = prepare(documents, tmp_path)

    def read():
        raise AssertionError("read again")

    second = prepare_documents(read, content="content", where="data.source", cache=tmp_path, validation_fraction=0.2)
    assert rows(second.train) == rows(first.train)
    assert [path.name for path in tmp_path.iterdir()] == [f"documents-{first.fingerprint}"]
    assert prepare(documents, tmp_path, content="other").fingerprint != first.fingerprint
    assert prepare(documents, tmp_path, fraction=0.3).fingerprint != first.fingerprint


def test_a_build_that_died_is_ignored(tmp_path):
    documents = [Document("a", str(i), f"text {i}") for i in range(5)]
    splits = prepare(documents, tmp_path / "fine")
    (tmp_path / "dead" / f".building-documents-{splits.fingerprint}-xyz").mkdir(parents=True)

    def dying():
        yield from documents[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_documents(
            dying, content="content", where="data.source", cache=tmp_path / "dead", validation_fraction=0.2
        )
    assert not (tmp_path / "dead" / f"documents-{splits.fingerprint}").exists()
    assert rows(prepare(documents, tmp_path / "dead").train) == rows(splits.train)


def test_of_two_builders_the_first_wins(tmp_path):
    def build(name):
        with building(tmp_path / "target") as folder:
            (folder / "name").write_text(name)
            if name == "slow":
                build("fast")

    build("slow")
    assert (tmp_path / "target" / "name").read_text() == "fast"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["target"]
