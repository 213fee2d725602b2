"""Checkpoints: parameters, optimizer, router state, data position, key and step as one unit, through Orbax.

Saving is asynchronous and atomic: a save that was cut off leaves a temporary folder that no restore looks at. Restoring
places every leaf where the mesh at hand wants it, whatever mesh saved it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from moe.config import ConfigError
from moe.train.run import CheckpointConfig
from moe.train.state import TrainState

FOLDER = "checkpoints"
METRIC = "bits_per_byte"
_ITEMS = ("state", "data")


class Checkpoints:
    """The checkpoints of a workdir: the newest ones, and the best by validation bits per byte."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        def best(metrics: dict[str, float]) -> float:
            return metrics[METRIC]

        keep: list[policy.PreservationPolicy] = [policy.LatestN(config.keep_last)]
        if config.keep_best:
            # reverse=True keeps the LOWEST; without the best_fn option too, a restarted manager forgets the metrics.
            keep.append(
                policy.BestN(
                    get_metric_fn=best, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                best_fn=best,
                best_mode="min",
                preservation_policy=policy.AnyPreservationPolicy(keep),
            ),
            item_names=_ITEMS,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any], bits_per_byte: float | None) -> None:
        """Starts a save; returns once the state is copied, so that the next step may donate it."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(data))
        metrics = None if bits_per_byte is None else {METRIC: bits_per_byte}
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(
        self, step: int, make: Callable[[], TrainState], shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, placed by `shardings`, and the data position."""
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(make),
            shardings,
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_as_dict(abstract)), data=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        return TrainState(**found["state"]), found["data"]

    def close(self) -> None:
        """Waits until the last save is complete."""
        self._manager.wait_until_finished()
        self._manager.close()


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints, rising; ConfigError if there is none."""
    folder = workdir / FOLDER
    steps = ocp.utils.checkpoint_steps(folder.absolute()) if folder.is_dir() else []
    if not steps:
        raise ConfigError(f"workdir = '{workdir}': holds no complete checkpoint in {FOLDER}/")
    return sorted(steps)


def latest_step(workdir: Path) -> int:
    """Step of the newest complete checkpoint; ConfigError if there is none."""
    return saved_steps(workdir)[-1]


def restore_parts(workdir: Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Some top-level entries of a saved state (say `params` and `balance`), without reading the rest."""
    path = (workdir / FOLDER / str(step) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                abstract, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
            ),
        )


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
