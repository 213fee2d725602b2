import json
import sys
import warnings

import numpy as np
import pytest

from moe.config import ConfigError, check
from moe.data import ByteConfig, HuggingFaceConfig, SentencePieceConfig

TEXT = "Où est la bibliothèque? 图书馆 🙂\n"
LINES = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog met on a mat"] * 20


@pytest.fixture
def tokenizer_json(tmp_path):
    """Trains a byte-level BPE with the given special tokens."""
    tokenizers = pytest.importorskip("tokenizers")

    def train(special):
        model = tokenizers.ByteLevelBPETokenizer()
        model.train_from_iterator(LINES, vocab_size=300, special_tokens=special, show_progress=False)
        model.save(str(tmp_path / "tokenizer.json"))
        return HuggingFaceConfig(path=str(tmp_path / "tokenizer.json"))

    return train


@pytest.fixture
def spm(tmp_path):
    """Trains a SentencePiece model with the given options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its SWIG module warns when it is imported
        sentencepiece = pytest.importorskip("sentencepiece")

    def train(**options):
        path = tmp_path / "model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_prefix=str(path), vocab_size=19, minloglevel=2, **options
        )
        return SentencePieceConfig(path=f"{path}.model")

    return train


def test_bytes_by_hand():
    tokenizer = ByteConfig().build()
    ids = tokenizer.encode("aé")
    assert ids.dtype == np.int32
    assert ids.tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (258, 256, 257)


def test_bytes_round_trip_without_specials():
    tokenizer = ByteConfig().build()
    assert tokenizer.decode([256, *tokenizer.encode(TEXT), 257]) == TEXT
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_hugging_face_round_trip(tokenizer_json):
    tokenizer = tokenizer_json(["<s>", "</s>"]).build()
    ids = tokenizer.encode("the cat")
    assert ids.dtype == np.int32 and len(ids) < len("the cat")
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == "the cat"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_hugging_face_appends_the_specials_it_lacks(tokenizer_json):
    tokenizer = tokenizer_json([]).build()
    size = max(tokenizer.encode("the cat sat on the mat").max(), 255) + 1
    assert tokenizer.bos >= size and tokenizer.eos == tokenizer.bos + 1
    assert tokenizer.vocab_size == tokenizer.eos + 1
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a dog"), tokenizer.eos]) == "a dog"


def test_hugging_face_takes_the_specials_of_its_config(tokenizer_json, tmp_path):
    config = tokenizer_json(["<s>", "<begin>", "<stop>"])
    plain = config.build()
    entries = {"bos_token": {"content": "<begin>"}, "eos_token": "<stop>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    tokenizer = config.build()
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.fingerprint != plain.fingerprint


def test_hugging_face_drops_specials_that_are_plain_words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert HuggingFaceConfig(path=str(tmp_path / "tokenizer.json")).build().decode([0, 2, 1]) == "a"


def test_sentencepiece_round_trip(spm):
    tokenizer = spm().build()
    ids = tokenizer.encode("the cat")
    assert ids.dtype == np.int32
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (19, 1, 2)
    assert tokenizer.decode([1, *ids, 2]) == "the cat"


def test_sentencepiece_appends_the_specials_it_lacks(spm):
    tokenizer = spm(bos_id=-1, eos_id=-1).build()
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (21, 19, 20)
    assert tokenizer.decode([19, *tokenizer.encode("the cat"), 20]) == "the cat"


@pytest.mark.parametrize("kind", [HuggingFaceConfig, SentencePieceConfig])
def test_missing_and_broken_files(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path = '.*absent': cannot be read \(No such file"):
        kind(path=str(tmp_path / "absent")).build()
    (tmp_path / "broken").write_text("not a tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=r"data\.tokenizer\.path = '.*broken': is not a "):
            kind(path=str(tmp_path / "broken")).build()
    with pytest.raises(ConfigError, match="path = '': must name a"):
        check(kind(path=""))


@pytest.mark.parametrize(
    ("kind", "library"), [(HuggingFaceConfig, "tokenizers"), (SentencePieceConfig, "sentencepiece")]
)
def test_a_missing_library_is_named(kind, library, tmp_path, monkeypatch):
    (tmp_path / "model").write_text("{}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"needs the library '{library}'; pip install \"moe\[hf\]\""):
        kind(path=str(tmp_path / "model")).build()
