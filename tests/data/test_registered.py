import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe.config import ConfigError
from moe.data import DataConfig, TfdsConfig, check_inputs, prepare
from moe.data.documents import quiet


def build(data_dir, name="c4", config="en", version="3.1.0", blank_examples=()):
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        blank = blank_examples
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, description="Small.")] if config else []

        def _info(self):
            features = {"text": tfds.features.Text(), "url": tfds.features.Text(), "n": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 60), "validation": self._generate_examples(60, 70)}

        def _generate_examples(self, begin, end):
            for i in range(begin, end):
                yield i, {"text": "" if i in self.blank else f"document {i:02}", "url": "x", "n": i}

    Builder.name = name
    with quiet():
        builder = Builder(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return builder


def problem(tmp_path, **source):
    source = TfdsConfig(**{"name": "c4/en:3.1.0", "data_dir": str(tmp_path / "tfds"), **source})
    with pytest.raises(ConfigError) as error:
        check_inputs(DataConfig(source=source, cache_dir=str(tmp_path / "cache")))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_read_by_name(tmp_path):
    build(tmp_path / "tfds")
    source = TfdsConfig(name="c4/en:3.1.0", data_dir=str(tmp_path / "tfds"))
    config = DataConfig(source=source, cache_dir=str(tmp_path / "cache"), seq_len=8)
    check_inputs(config)
    assert not (tmp_path / "cache").exists()
    corpus = prepare(config)
    assert corpus.domains == ("c4-en",)
    assert corpus.num_train_tokens("c4-en") == 60 * (len("document 00") + 2)
    text = corpus.validation("c4-en", None).text_bytes.decode()
    assert sorted(text.split("document ")[1:]) == [str(i) for i in range(60, 70)]
    train = corpus.tokenizer.decode(corpus._domains["c4-en"].train.tokens[:])
    assert sorted(train.split("document ")[1:]) == [f"{i:02}" for i in range(60)]
    assert "tensorflow" not in sys.modules


def test_examples_without_text_are_left_out(tmp_path):
    build(tmp_path / "tfds", blank_examples=(0, 30, *range(60, 69)))
    source = TfdsConfig(name="c4/en:3.1.0", data_dir=str(tmp_path / "tfds"))
    corpus = prepare(DataConfig(source=source, cache_dir=str(tmp_path / "cache"), seq_len=8))
    assert corpus.num_train_tokens("c4-en") == 58 * 13
    assert corpus.validation("c4-en", 12).text_bytes == b"document 69"


def test_parts_of_a_split(tmp_path):
    build(tmp_path / "tfds", "lm1b", None, "1.1.0")
    parts = {"split_train": "train[10%:]", "split_validation": "train[:10%]"}
    source = TfdsConfig(name="lm1b", data_dir=str(tmp_path / "tfds"), **parts)
    corpus = prepare(DataConfig(source=source, cache_dir=str(tmp_path / "cache"), seq_len=8))
    assert corpus.num_train_tokens("lm1b") == 54 * 13
    assert corpus.validation("lm1b").num_bytes == 6 * 11


def test_overlapping_splits_are_refused(tmp_path):
    build(tmp_path / "tfds")
    message = problem(tmp_path, split_train="train", split_validation="train[99%:]")
    assert message.startswith("data.source.split_validation = 'train[99%:]': shares examples with split_train")


def test_not_prepared(tmp_path):
    for name in ("c4/en:3.1.0", "lm1b", "no_such_thing"):
        message = problem(tmp_path, name=name)
        assert message.startswith(f"data.source.name = {name!r}: is not prepared in data_dir = ")
        assert f"tfds build {name} --file_format=array_record --data_dir=" in message
    assert not (tmp_path / "tfds").exists()


def test_other_file_formats(tmp_path):
    info = build(tmp_path / "tfds").data_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = problem(tmp_path)
    assert "as tfrecord, not as array_record; run python -m launch.data convert --source " in message


def test_wrong_fields(tmp_path):
    build(tmp_path / "tfds")
    assert problem(tmp_path, text_field="body").endswith("c4/en/3.1.0 has no such text; it has text, url")
    assert "text_field = 'n': c4/en/3.1.0 has no such text" in problem(tmp_path, text_field="n")
    assert "split_train = 'nope': is no split of c4/en/3.1.0, which has train, valid" in problem(
        tmp_path, split_train="nope"
    )
    assert "split_validation = 'train[': is no split" in problem(tmp_path, split_validation="train[")
