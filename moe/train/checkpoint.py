"""Checkpoints: parameters, optimizer, router state, data position, key and step as one unit, through Orbax.

Saving is asynchronous and atomic: a save that was cut off leaves a temporary folder that no restore looks at. Restoring
places every leaf where the mesh at hand wants it, whatever mesh saved it, and compares it with the checksum it was
saved with (`moe.train.manifest`). Reading waits for no other process (Orbax's own `restore` does, for ever if one of
them failed), so one process may read alone; the processes of a run tell each other afterwards what they found.
"""

import contextlib
import dataclasses
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from moe.config import ConfigError
from moe.train import manifest
from moe.train.failures import Damaged, StorageError
from moe.train.manifest import METRIC, Manifest
from moe.train.run import CheckpointConfig
from moe.train.saved import read, verify
from moe.train.state import TrainState
from moe.train.storage import CHECKPOINTS, storage_errors, whole_steps
from moe.train.together import the_same, together

log = logging.getLogger(__name__)

DAMAGED = "damaged"
"""Folder of a workdir to which damaged checkpoints are moved."""
_LEFTOVER = "*.orbax-checkpoint-tmp*"


class Restored(NamedTuple):
    step: int
    state: TrainState
    data: dict[str, Any]
    """What was given to `save`."""


class Checkpoints:
    """The checkpoints of a workdir: the newest ones, and the best by validation bits per byte.

    With several processes all make it, and all call each of its methods.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self._workdir, self._config = workdir.absolute(), config
        self._folder = self._workdir / CHECKPOINTS
        self._manager: _Manager | None = None
        self._under_way = 0
        """Step of the last save that was begun."""

    def save(self, step: int, state: TrainState, data: dict[str, Any], bits_per_byte: float | None) -> None:
        """Starts a save; returns once the state is copied, so that the next step may donate it.

        StorageError if the disk refuses this save, or refused the one before, which went on behind the steps.
        """
        item = manifest.seal(data, bits_per_byte, state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(item))
        metrics = None if bits_per_byte is None else {METRIC: bits_per_byte}
        self._finish()
        self._under_way = step
        with self._storage_errors():
            self._open().save(step, args=args, metrics=metrics, force=True)

    def restore_newest(
        self,
        make: Callable[[], TrainState],
        shardings: TrainState,
        skipped: Callable[[int, str], None] = lambda step, reason: None,
    ) -> Restored | None:
        """The newest checkpoint that is as it was saved, placed by `shardings`; None if nothing was ever saved.

        Newer ones that are damaged are named in the log and to `skipped`, and moved to WORKDIR/damaged/STEP-n, so that
        their steps can be saved again. Damaged, on every process, if none is left: then all stay where they are.
        """
        self._finish()
        steps = the_same(lambda: whole_steps(self._workdir), f"the checkpoints in {self._folder}")
        wrong: dict[int, str] = {}
        for step in reversed(steps):
            try:
                state, data = self.restore(step, make, shardings)
            except Damaged as error:
                log.warning("%s", error)
                wrong[step] = str(error)
                continue
            for number, reason in wrong.items():
                self._put_aside(number)
                skipped(number, reason)
            self._open()
            return Restored(step, state, data)
        if wrong:
            raise Damaged(
                f"no checkpoint in {self._folder} is as it was saved: {'; '.join(wrong.values())}. They stay there; to"
                " begin at step 0 use another workdir"
            )
        self._open()
        return None

    def restore(
        self, step: int, make: Callable[[], TrainState], shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, placed by `shardings`, and the data position.

        Damaged, on every process, if one of them finds it not as it was saved; ConfigError if it is another model's.
        """
        self._finish()
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            _as_dict(jax.eval_shape(make)),
            _as_dict(shardings),
        )
        args = ocp.args.StandardRestore(abstract)
        folder = self._folder / str(step)

        def read_own() -> tuple[Manifest, Any]:
            return read(folder, abstract, lambda path: ocp.StandardCheckpointHandler().restore(path, args=args))

        about, tree = together(read_own, (Damaged, ConfigError))
        if about.leaves is None:
            log.warning("checkpoint %d was saved without checksums: it is not verified", step)
        state = TrainState(**tree)  # the order of leaves that `seal` and `check_replicas` have compiled for
        together(lambda: verify(folder, about, state), (Damaged,))
        return state, about.data

    def forget(self, step: int) -> None:
        """Deletes the checkpoint of `step`, which then can be saved again."""
        self._finish()
        with self._storage_errors():
            self._open().delete(step)

    def close(self) -> None:
        """Waits until the last save is complete; StorageError if the disk refused it."""
        self._finish()
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> "_Manager":
        """Orbax's manager, once nothing stands in its way; it removes what a save that was cut off left."""
        if self._manager is None:
            for step in whole_steps(self._workdir):  # Orbax reads all of these at once and stops at the first it cannot
                self._check_metric(step)
            with self._storage_errors():
                self._manager = _manager(self._folder, self._config)
        return self._manager

    def _check_metric(self, step: int) -> None:
        try:
            together(lambda: manifest.read_metric(self._folder / str(step)), (Damaged,))
        except Damaged as error:
            log.warning("checkpoint %d: %s", step, error)
            self._put_aside(step)

    def _finish(self) -> None:
        """Waits for a save that is under way, and says if it failed."""
        if self._manager is not None:
            with self._storage_errors():
                self._manager.wait()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """As the function of this name; and what the failed save left half-written is removed."""
        failed = f"checkpoint {self._under_way} is not saved" if self._under_way else "no checkpoint can be saved"
        try:
            with storage_errors(failed, self._workdir):
                yield
        except StorageError:
            if jax.process_index() == 0:
                for path in self._folder.glob(_LEFTOVER):
                    shutil.rmtree(path, ignore_errors=True)
            raise

    def _put_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way, on process 0."""

        def move() -> None:
            folder = self._workdir / DAMAGED
            if jax.process_index() == 0:
                with storage_errors(f"damaged checkpoint {step} cannot be moved to {folder}", self._workdir):
                    number = 1
                    while (folder / f"{step}-{number}").exists():
                        number += 1
                    folder.mkdir(exist_ok=True)
                    (self._folder / str(step)).rename(folder / f"{step}-{number}")

        together(move, (StorageError,))
        if self._manager is not None:
            self._manager.reload()  # or it refuses to save this step again
        log.warning("checkpoint %d was moved to %s", step, self._workdir / DAMAGED)


class _Manager(ocp.CheckpointManager):
    """Orbax's own, but a save that failed on this process alone is told at once, so that the process can end.

    Orbax's thread behind the save first waits for the other processes, which wait for it at another barrier.
    """

    _failure: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()  # private, but no other hook comes before that wait
        except BaseException as error:
            self._failure = error
            raise

    def wait(self) -> None:
        """Waits until the save that is under way is complete; raises what made it fail, here or on another process."""
        if jax.process_count() == 1:
            self.wait_until_finished()
            return
        ended = threading.Event()

        def wait() -> None:
            try:
                self.wait_until_finished()
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                ended.set()

        threading.Thread(target=wait, daemon=True).start()
        while not ended.wait(0.05) and self._failure is None:
            pass
        if self._failure is not None:
            raise self._failure


def _manager(folder: Path, config: CheckpointConfig) -> _Manager:
    def best(metrics: dict[str, float]) -> float:
        return metrics[METRIC]

    keep: list[policy.PreservationPolicy] = [policy.LatestN(config.keep_last)]
    if config.keep_best:
        # reverse=True keeps the LOWEST; without the best_fn option too, a restarted manager forgets the metrics.
        keep.append(
            policy.BestN(get_metric_fn=best, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False)
        )
    return _Manager(
        folder,
        options=ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            best_fn=best,
            best_mode="min",
            preservation_policy=policy.AnyPreservationPolicy(keep),
        ),
        item_names=("state", manifest.ITEM),
    )


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
