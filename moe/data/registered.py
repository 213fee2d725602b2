"""Any text dataset that TFDS knows by name and that is already prepared on this machine."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from moe.config import ConfigError
from moe.data.documents import DocumentSplits, TextColumn, quiet
from moe.data.sources import SourceConfig

NAME = re.compile(r"(\w+)(/[\w.-]+)?(:[\w.*]+)?")  # dataset/config:version


@dataclass(frozen=True, kw_only=True)
class TfdsConfig(SourceConfig):
    """A dataset by its TFDS name, such as `lm1b` or `c4/en:3.1.0`, prepared as ArrayRecord in `data_dir`.

    It is read where it lies and forms one domain named after it. Splits are in TFDS's syntax (`train[:1%]`); a
    dataset without a validation split takes `train[1%:]` and `train[:1%]`. `DataConfig.validation_fraction` has
    nothing to say here.
    """

    name: str
    """TFDS name, such as `lm1b` or `c4/en:3.1.0`."""
    data_dir: str = "~/tensorflow_datasets"
    """Where TFDS prepared it, as ArrayRecord."""
    text_field: str = "text"
    """Feature that holds the text."""
    split_train: str = "train"
    """Split to train on, in TFDS notation (`train[:90%]`)."""
    split_validation: str = "validation"
    """Split that is held out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not NAME.fullmatch(self.name):
            yield "name", "must be a TFDS name, dataset[/config][:version]"
        for field in ("data_dir", "text_field", "split_train", "split_validation"):
            if not getattr(self, field):
                yield field, "must not be empty"

    def fingerprint(self, where: str) -> str:
        """Of the dataset's name, version and sizes: it may be too large to be read as a whole."""
        info = self._builder(where).info
        splits = [(name, split.num_bytes, split.shard_lengths) for name, split in sorted(info.splits.items())]
        content = (info.full_name, splits, self.text_field, self.split_train, self.split_validation)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def check(self, where: str) -> None:
        builder = self._builder(where)
        texts = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
        if self.text_field not in texts:
            raise ConfigError(
                f"{where}.text_field = {self.text_field!r}: {builder.info.full_name} has no such text; "
                f"it has {', '.join(sorted(texts)) or 'none'}"
            )
        ranges = {field: self._ranges(builder, where, field) for field in ("split_train", "split_validation")}
        for file, (begin, end) in ranges["split_validation"]:
            if any(other == file and begin < stop and start < end for other, (start, stop) in ranges["split_train"]):
                raise ConfigError(
                    f"{where}.split_validation = {self.split_validation!r}: shares examples with split_train = "
                    f"{self.split_train!r}; take for example 'train[1%:]' and 'train[:1%]'"
                )

    def open(self, where: str, cache: Path, validation_fraction: float) -> DocumentSplits:
        self.check(where)
        domain = self.name.partition(":")[0].replace("/", "-")
        again = "unless the disk is to blame, prepare it again"
        with quiet():
            sources = [
                tfds.data_source(self.name, split=split, data_dir=self._data_dir())
                for split in (self.split_train, self.split_validation)
            ]
        place = f"{self.name} in {self._data_dir()}"
        train, validation = (TextColumn(source, self.text_field, domain, place, again) for source in sources)
        return DocumentSplits(self.fingerprint(where)[:16], train, validation)

    def _data_dir(self) -> Path:
        return Path(self.data_dir).expanduser()

    def _builder(self, where: str) -> tfds.core.DatasetBuilder:
        what = f"{where}.name = {self.name!r}"
        try:
            with quiet():
                builder = tfds.builder(self.name, data_dir=self._data_dir())
        except tfds.core.DatasetNotFoundError as error:
            raise self._not_prepared(what) from error
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"{what}: {str(error).strip().splitlines()[0]}") from error
        if not Path(builder.data_dir).is_dir() or not builder.info.splits:
            raise self._not_prepared(what)
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise ConfigError(
                f"{what}: is stored in {builder.data_dir} as {builder.info.file_format.value}, not as array_record; "
                f"run python -m launch.data convert --source {builder.data_dir} --data-dir NEW_FOLDER"
            )
        return builder

    def _not_prepared(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what}: is not prepared in data_dir = {self.data_dir!r}; where TensorFlow is installed, run once: "
            f"tfds build {self.name} --file_format=array_record --data_dir={self.data_dir}"
        )

    def _ranges(self, builder: Any, where: str, field: str) -> list[tuple[str, tuple[int, int]]]:
        """(file, range of its records) that make up the split."""
        split = getattr(self, field)
        try:
            instructions = builder.info.splits[split].file_instructions
        except (ValueError, KeyError, AssertionError) as error:
            known = ", ".join(sorted(builder.info.splits))
            raise ConfigError(
                f"{where}.{field} = {split!r}: is no split of {builder.info.full_name}, which has {known}; "
                "a part of one is written 'train[:1%]'"
            ) from error
        ranges = []
        for part in instructions:
            end = part.examples_in_shard if part.take < 0 else part.skip + part.take
            ranges.append((str(part.filename), (part.skip, end)))
        if not ranges:
            raise ConfigError(f"{where}.{field} = {split!r}: this part of {builder.info.full_name} has no example")
        return ranges
