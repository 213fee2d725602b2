"""The training loader: global steps of packed sequences for the rows that one process reads."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moe.config import ConfigError
from moe.data.corpus import Corpus
from moe.data.reading import DataError


class _Steps(Sequence):
    """Random access by global step; micro-batch a, row b of step k is sequence (k * A + a) * B + b."""

    def __init__(self, dataset: grain.MapDataset, accumulation: int, batch_size: int, rows: Sequence[int]):
        self._dataset = dataset
        self._offsets = [a * batch_size + row for a in range(accumulation) for row in rows]
        self._shape = (accumulation, len(rows))
        self._stride = accumulation * batch_size

    def __len__(self) -> int:
        return sys.maxsize // self._stride

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        sequences = [self._dataset[step * self._stride + offset] for offset in self._offsets]
        return {
            name: np.stack([sequence[name] for sequence in sequences]).reshape(*self._shape, -1)
            for name in sequences[0]
        }


class TrainLoader(Iterator[dict[str, np.ndarray]]):
    """Yields one dict per global step: the arrays of `packing.Windows`, int32 [A, len(rows), S + 1].

    Row b of micro-batch a of step k is sequence `(k * A + a) * B + b` of `corpus.train_dataset(seed)`, whichever
    process reads it: the data of a step do not depend on how many processes there are, and only A * B and the seed
    fix them. `rows` are the rows out of `range(batch_size)` that this process reads, in this order. `num_threads`
    read ahead up to `prefetch` steps.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        accumulation: int,
        batch_size: int,
        rows: Sequence[int],
        seed: int,
        num_threads: int = 2,
        prefetch: int = 16,
    ):
        if not rows:
            raise ValueError("rows is empty: every process must read at least one row")
        if outside := [row for row in rows if not 0 <= row < batch_size]:
            raise ValueError(f"rows has {outside[0]}, which is not in range(batch_size = {batch_size})")
        steps = _Steps(corpus.train_dataset(seed), accumulation, batch_size, tuple(rows))
        self._identity = {
            "fingerprint": corpus.fingerprint,
            "seed": seed,
            "sequences_per_step": accumulation * batch_size,
        }
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
        self._next_step = 0

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except DataError as error:
            raise DataError(f"the batch of data step {self._next_step + 1}: {error}") from error
        self._next_step += 1
        return batch

    @property
    def next_step(self) -> int:
        """The step that comes next, counted from 0 in steps of data: what `seek` takes."""
        return self._next_step

    def seek(self, next_step: int) -> None:
        """Goes to a step of the data: the batch that comes next is that of `next_step`."""
        self._next_step = next_step
        self._iterator.set_state({"next_index": next_step})

    def get_state(self) -> dict[str, Any]:
        """JSON data, the same on every process: the step that comes next, and what it was counted in."""
        return {"next_step": self._next_step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the position of `state`; raises ConfigError if it was counted in other data."""
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ConfigError(
                    f"data: {name} = {mine!r}: the saved position has {state.get(name)!r}; go on with the data, seed "
                    "and sequences per step it was saved with, or start anew"
                )
        self.seek(int(state["next_step"]))

    def close(self) -> None:
        """Stops the reading threads; the loader cannot be used after it."""
        self._iterator.close()
