import dataclasses
from collections import Counter

import numpy as np
import pytest

from moe.config import ConfigError
from moe.data import FilesConfig, FolderConfig, HuggingFaceConfig, MixtureConfig, prepare


def domain_of(sequence):
    """`low` text is lower case, `high` text is not."""
    letters = sequence["tokens"][sequence["segment_ids"] > 0]
    return "low" if any(97 <= token < 123 for token in letters) else "high"


def key(sequence):
    return sequence["tokens"].tobytes() + sequence["segment_ids"].tobytes()


def test_the_same_in_every_build(config, tmp_path):
    first, again = prepare(config), prepare(config)
    rebuilt = prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "other")))
    for other in (again, rebuilt):
        assert other.fingerprint == first.fingerprint
        a, b = first.train_dataset(3), other.train_dataset(3)
        assert [key(a[i]) for i in range(300)] == [key(b[i]) for i in range(300)]
    a, b = first.train_dataset(3), first.train_dataset(4)
    assert [key(a[i]) for i in range(300)] != [key(b[i]) for i in range(300)]


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 17}, {"shuffle_seed": 1}, {"validation_fraction": 0.3}, {"domain_weights": "equal"}],
)
def test_fingerprint_knows_what_changes_the_sequences(config, change):
    (first, other) = prepare(config), prepare(dataclasses.replace(config, **change))
    assert first.fingerprint != other.fingerprint


def test_fingerprint_leaves_out_what_does_not(config):
    assert prepare(config).fingerprint == prepare(dataclasses.replace(config, num_threads=0, prefetch=1)).fingerprint


def test_every_token_is_predicted_once_per_epoch(texts, config):
    config = dataclasses.replace(config, source=FolderConfig(path=str(texts / "low")))
    corpus = prepare(config)
    [domain] = corpus.domains
    num_tokens = corpus.num_train_tokens(domain)
    num_windows = -(-(num_tokens - 1) // 16)
    dataset = corpus.train_dataset(0)
    epochs = [[dataset[epoch * num_windows + i] for i in range(num_windows)] for epoch in range(3)]
    windows = [Counter(map(key, epoch)) for epoch in epochs]
    assert windows[0] == windows[1] == windows[2]
    assert list(map(key, epochs[0])) != list(map(key, epochs[1])), "reshuffled"
    assert sum(int((w["segment_ids"][1:] > 0).sum()) for w in epochs[0]) == num_tokens - 1
    ends = sum(int((w["tokens"][1:][w["segment_ids"][1:] > 0] == 257).sum()) for w in epochs[0])
    validation = corpus.validation(domain).num_bytes
    assert corpus.num_train_bytes(domain) + validation == sum(f.stat().st_size for f in (texts / "low").iterdir())
    assert num_tokens == corpus.num_train_bytes(domain) + 2 * ends


def test_documents_are_shuffled_before_packing(texts, config):
    config = dataclasses.replace(config, source=FolderConfig(path=str(texts / "low")), seq_len=4000)
    orders = []
    for seed in (0, 1):
        window = prepare(dataclasses.replace(config, shuffle_seed=seed)).train_dataset(0)[0]
        text = bytes(t if t < 256 else 10 for t in window["tokens"]).split(b"\n\n")
        orders.append([document.count(b"x") for document in text if document.strip(b"\0\n")])
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0] != orders[1]


def test_training_never_sees_validation_text(stdlib):
    for domain in ("headers", "tables"):
        training = stdlib._domains[domain].train
        train_text = stdlib.tokenizer.decode(training.tokens[:])
        for _, text in stdlib._domains[domain].validation.read(stdlib._domains[domain].documents):
            assert text not in train_text


@pytest.mark.parametrize(("domain_weights", "share"), [("size", None), ("equal", 0.5)])
def test_domain_weights(texts, config, domain_weights, share):
    for file in sorted((texts / "low").iterdir())[5:]:
        file.unlink()
    corpus = prepare(dataclasses.replace(config, domain_weights=domain_weights))
    tokens = {domain: corpus.num_train_tokens(domain) for domain in corpus.domains}
    share = share or tokens["low"] / sum(tokens.values())
    dataset = corpus.train_dataset(0)
    found = Counter(domain_of(dataset[i]) for i in range(2000))
    assert found["low"] / 2000 == pytest.approx(share, abs=0.005)


def test_mixture_weights_apply_between_parts(texts, config):
    low, high = (FolderConfig(path=str(texts / name)) for name in ("low", "high"))
    inner = MixtureConfig(parts=(low, high), weights=(3, 1))
    mixture = MixtureConfig(parts=(inner, high), weights=(4, 1))
    corpus = prepare(dataclasses.replace(config, source=mixture))
    assert corpus.domains == ("high-1", "high-2", "low")
    dataset = corpus.train_dataset(0)
    found = Counter(domain_of(dataset[i]) for i in range(2000))
    assert found["low"] / 2000 == pytest.approx(0.6, abs=0.005)
    assert [leaf.where for leaf in mixture.leaves("s")] == ["s.parts.0.parts.0", "s.parts.0.parts.1", "s.parts.1"]


def test_validation_text_and_batches(config):
    corpus = prepare(config)
    whole = corpus.validation("low", None)
    assert whole.num_bytes == len(whole.text_bytes) > 100
    some = corpus.validation("low", 100)
    assert some.text_bytes == whole.text_bytes[:100]
    batches = list(some.batches(3, 16))
    assert all(value.shape == (3, 17) and value.dtype == np.int32 for batch in batches for value in batch.values())
    tokens, segments = (
        np.concatenate([batch[name][:, 1:].ravel() for batch in batches]) for name in ("tokens", "segment_ids")
    )
    predicted = tokens[segments > 0]
    assert bytes(t for t in predicted.tolist() if t < 256) == some.text_bytes
    assert (predicted == 257).sum() == 2  # a whole document and one that is cut
    again = list(corpus.validation("low", 100).batches(3, 16))
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(batches, again, strict=True))


def test_validation_is_cut_between_characters(tmp_path, config):
    (tmp_path / "e.jsonl").write_text('{"text": "éééé"}\n{"text": "éééé"}\n')
    corpus = prepare(dataclasses.replace(config, source=FilesConfig(paths=(str(tmp_path / "e.jsonl"),))))
    assert corpus.validation("e", 5).text_bytes == "éé".encode()
    with pytest.raises(ConfigError, match="max_bytes = 1: leaves no validation text of domain 'e'"):
        corpus.validation("e", 1)


def test_large_vocabularies_are_stored_in_four_bytes(config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "abcdefghij": 65600}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("abcdefghij", "isolated")
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceConfig(path=str(tmp_path / "tokenizer.json"))
    corpus = prepare(dataclasses.replace(config, tokenizer=tokenizer))
    assert corpus.tokenizer.vocab_size == 65603
    stream = corpus._domains["low"].train.tokens[:]
    assert stream.dtype == np.uint32 and (stream == 65600).any() and stream.max() == corpus.tokenizer.eos
