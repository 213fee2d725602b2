import ast
import dataclasses
import logging
import sys
import unicodedata

import pytest

from moe.config import ConfigError
from moe.data import DataConfig, StdlibConfig, check_inputs, prepare
from moe.data import stdlib as module


def texts(corpus, domain):
    """The held-out documents and the training text of a domain."""
    part = corpus._domains[domain]
    return [text for _, text in part.validation.read(part.documents)], corpus.tokenizer.decode(part.train.tokens[:])


def test_domains_and_sizes(stdlib):
    expected = {"code": 6.0, "english": 3.2, "tables": 1.2, "headers": 0.9, "names": 3.0, "arithmetic": 4.3}
    assert set(stdlib.domains) <= set(expected)
    for domain in ("code", "english", "tables", "names"):
        assert 0.7 < stdlib.num_train_bytes(domain) / 1e6 / expected[domain] < 1.3
        assert 0.01 < stdlib.validation(domain).num_bytes / stdlib.num_train_bytes(domain) < 0.12
    assert len(stdlib.fingerprint) == 16


def test_domains_are_what_they_say(stdlib):
    documents, train = texts(stdlib, "code")
    for text in documents:
        ast.parse(text)
        assert '    """' not in text[:400] or "=" in text
    assert "import " in train and "# Licensed" not in train
    documents, train = texts(stdlib, "english")
    assert 'The "if" statement' in train + "".join(documents)
    documents, train = texts(stdlib, "names")
    assert f"U+0041 A {unicodedata.name('A')}; category Lu; bidirectional L\n" in train + "".join(documents)
    documents, train = texts(stdlib, "tables")
    assert "decoding" in train and "import codecs" not in train
    if "headers" in stdlib.domains:
        assert "#define" in texts(stdlib, "headers")[1]


def test_one_domain_alone(tmp_path):
    config = DataConfig(source=StdlibConfig(domains=("tables",)), cache_dir=str(tmp_path))
    check_inputs(config)
    assert list(tmp_path.iterdir()) == []
    assert prepare(config).domains == ("tables",)


def test_what_an_installation_lacks_is_skipped_with_a_word(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / name))
    caplog.set_level(logging.INFO)
    config = DataConfig(source=StdlibConfig(domains=("headers", "names")), cache_dir=str(tmp_path / "cache"))
    assert prepare(config).domains == ("names",)
    assert "this Python installation has no text for domain 'headers', skipped" in caplog.text
    assert "domain 'names': " in caplog.text and " MB" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.source\.domains = \('headers',\): Python .* has no text for them"):
        check_inputs(dataclasses.replace(config, source=StdlibConfig(domains=("headers",))))
    assert "tensorflow" not in sys.modules
