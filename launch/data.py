"""Looks at and prepares training text.

python -m launch.data describe [--folder TEXTS | --files a.jsonl b.parquet | --dataset lm1b --data-dir DIR]
python -m launch.data convert --source DIR/c4/en/3.1.0 --data-dir NEW_DIR
"""

import json
import logging
import sys
from pathlib import Path

import grain
import tensorflow_datasets as tfds
import tyro
from array_record.python.array_record_module import ArrayRecordWriter

from launch import exits
from moe.config import ConfigError
from moe.data import (
    ByteConfig,
    DataConfig,
    DataError,
    FilesConfig,
    FolderConfig,
    HuggingFaceConfig,
    SentencePieceConfig,
    SourceConfig,
    StdlibConfig,
    TfdsConfig,
    TokenizerConfig,
    check_inputs,
    prepare,
)
from moe.data.documents import building

SAMPLE_BYTES = 80


def describe(
    folder: str | None = None,
    files: tuple[str, ...] = (),
    dataset: str | None = None,
    data_dir: str = TfdsConfig.data_dir,
    split_train: str = TfdsConfig.split_train,
    split_validation: str = TfdsConfig.split_validation,
    tokenizer: str | None = None,
    seq_len: int = DataConfig.seq_len,
    cache_dir: str = DataConfig.cache_dir,
) -> None:
    """Prints domains, sizes and a sample of each; without a source, of Python's own standard library.

    Args:
        folder: A folder of text files.
        files: .jsonl and .parquet files of documents.
        dataset: The name of a prepared TFDS dataset.
        data_dir: Where TFDS datasets are.
        split_train: The training split of the TFDS dataset.
        split_validation: Its validation split, such as train[:1%].
        tokenizer: A tokenizer.json or a SentencePiece .model; bytes without it.
        seq_len: Predicted tokens of a sequence.
        cache_dir: Where the packed tokens are kept.
    """
    given: list[SourceConfig] = []
    given += [FolderConfig(path=folder)] if folder else []
    given += [FilesConfig(paths=files)] if files else []
    splits = {"split_train": split_train, "split_validation": split_validation}
    given += [TfdsConfig(name=dataset, data_dir=data_dir, **splits)] if dataset else []
    if len(given) > 1:
        raise ConfigError("give one of --folder, --files and --dataset")
    config = DataConfig(
        source=given[0] if given else StdlibConfig(),
        tokenizer=_tokenizer(tokenizer),
        seq_len=seq_len,
        cache_dir=cache_dir,
    )
    check_inputs(config)
    corpus = prepare(config)
    print(f"{'domain':<16}{'train MB':>10}{'tokens':>14}{'validation MB':>15}  first validation text")
    for domain in corpus.domains:
        held_out = corpus.validation(domain)
        sample = " ".join(held_out.text_bytes[:SAMPLE_BYTES].decode(errors="ignore").split())
        print(
            f"{domain:<16}{corpus.num_train_bytes(domain) / 1e6:>10.2f}{corpus.num_train_tokens(domain):>14,}"
            f"{held_out.num_bytes / 1e6:>15.2f}  {sample}"
        )
    print(f"fingerprint {corpus.fingerprint}, vocabulary {corpus.tokenizer.vocab_size}")


def convert(source: str, data_dir: str) -> None:
    """Copies a TFDS dataset stored as TFRecord to ArrayRecord, without TensorFlow.

    Args:
        source: The folder of one version of the dataset, with its dataset_info.json.
        data_dir: Where to write it; read it from there with the name it has.
    """
    if not Path(source, "dataset_info.json").is_file():
        raise ConfigError(f"--source {source}: has no dataset_info.json; give the folder of one version of a dataset")
    builder = tfds.builder_from_directory(source)
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise ConfigError(f"--source {source}: is stored as {builder.info.file_format.value}, not as tfrecord")
    target = Path(data_dir, builder.info.full_name)
    if target.exists():
        raise ConfigError(f"--data-dir {data_dir}: has {builder.info.full_name} already")
    with building(target) as folder:
        for split in builder.info.splits.values():
            template = split.filename_template.replace(data_dir=folder, filetype_suffix="array_record")
            for index, (path, length) in enumerate(zip(split.filepaths, split.shard_lengths, strict=True)):
                copy = template.sharded_filepath(shard_index=index, num_shards=split.num_shards)
                if (copied := _copy_records(str(path), str(copy))) != length:
                    raise ConfigError(f"--source {source}: {path} has {copied} records instead of {length}")
        for path in Path(source).glob("*.*"):
            if "tfrecord" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())
        info = json.loads(Path(source, "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}, indent=2))
    print(target)


def main(args: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        tyro.extras.subcommand_cli_from_dict({"describe": describe, "convert": convert}, args=args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return exits.MISTAKE
    except DataError as error:
        print(error, file=sys.stderr)
        return exits.STORAGE
    return exits.FINISHED


def _tokenizer(path: str | None) -> TokenizerConfig:
    if path is None:
        return ByteConfig()
    return HuggingFaceConfig(path=path) if path.endswith(".json") else SentencePieceConfig(path=path)


def _copy_records(source: str, target: str) -> int:
    # group_size:1 is what TFDS writes itself: one record can be read without its neighbours.
    writer = ArrayRecordWriter(target, "group_size:1")
    count = 0
    for record in grain.experimental.TFRecordIterDataset(source):
        writer.write(record)
        count += 1
    writer.close()
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
