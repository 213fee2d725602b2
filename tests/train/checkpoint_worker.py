"""One of two processes:  python -m tests.train.checkpoint_worker PORT INDEX FOLDER

Saves, restores and compares what both hold; writes what it finds to FOLDER/found.INDEX.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe.config import ConfigError
from moe.train import manifest
from moe.train.checkpoint import Checkpoints
from moe.train.checksums import checksums
from moe.train.failures import Damaged, Diverged, StorageError
from moe.train.replicas import check_replicas
from moe.train.run import CheckpointConfig
from moe.train.saved import restore_parts
from moe.train.state import TrainState
from moe.train.together import the_same, together
from tests.train.small_state import make, mesh_of, placed, shardings

NO_PATIENCE = mock.patch.multiple("moe.train.together", _PATIENCE=1)


def only(process: int, action: Any) -> Any:
    """A stand-in for `manifest.read` that fails on one process alone, and only for the newest checkpoint."""
    plain = manifest.read

    def read(folder: Path) -> Any:
        if jax.process_index() == process and folder.name == "6":
            action()
        return plain(folder)

    return mock.patch.object(manifest, "read", read)


def unreadable() -> None:
    raise PermissionError("this host may not")


def said(run: Any) -> str:
    try:
        run()
    except (Damaged, Diverged, StorageError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def other_bits(leaf: jax.Array, device: int) -> jax.Array:
    parts = [np.array(shard.data) for shard in leaf.addressable_shards]
    for part, shard in zip(parts, leaf.addressable_shards, strict=True):
        part += shard.device.id == device
    placed = [jax.device_put(part, shard.device) for part, shard in zip(parts, leaf.addressable_shards, strict=True)]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)


def main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    where, workdir = shardings(mesh_of(jax.devices())), folder / "run"
    states: dict[int, TrainState] = {step: placed(step, where) for step in (3, 6)}
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    assert checkpoints.restore_newest(make, where) is None
    for step, state in states.items():
        checkpoints.save(step, state, {"next_step": step}, None)
    checkpoints.close()
    found["checksums"] = checksums(states[6])

    if jax.process_index() == 0:  # alone, as the report at the end of a run is made
        device = SingleDeviceSharding(jax.local_devices()[0])
        one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
        parts = restore_parts(workdir, 6, {"params": jax.tree.map(one, jax.eval_shape(make).params)})
        found["alone"] = checksums(parts)

    checkpoints = Checkpoints(workdir, CheckpointConfig())
    with only(1, unreadable):  # one process alone must not leave the other waiting
        restored = checkpoints.restore_newest(make, where)
    assert restored is not None
    found["restored"] = [restored.step, restored.data, checksums(restored.state) == checksums(states[3])]
    checkpoints.save(6, states[6], {"next_step": 6}, None)
    checkpoints.close()
    again = Checkpoints(workdir, CheckpointConfig()).restore_newest(make, where)
    found["again"] = again is not None and [again.step, checksums(again.state) == found["checksums"]]

    skipped = states[6].skipped
    bad = dataclasses.replace(states[6], skipped=other_bits(skipped, jax.devices()[-1].id))
    check_replicas(states[6])
    found["replicas"] = said(lambda: check_replicas(bad))

    def fails_on_1() -> None:
        if jax.process_index() == 1:
            raise ConfigError("a mistake")

    found["mistake"] = said(lambda: together(fails_on_1, (Damaged, ConfigError)))
    with NO_PATIENCE:
        found["not shared"] = said(lambda: the_same(lambda: [jax.process_index()], "the checkpoints"))
    return found


if __name__ == "__main__":
    port, index, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    (out / f"found.{index}").write_text(json.dumps(main(out)))
