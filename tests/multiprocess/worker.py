"""One of two processes:  python -m tests.multiprocess.worker PORT INDEX FOLDER TEXT

Hands over the rows of its own devices and no others, and writes what it finds to FOLDER/NAME.INDEX.
"""

import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import axes
from moe.data import TrainLoader, prepare
from moe.train.place import local_rows, place
from moe.train.state import create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step
from tests import grid
from tests.multiprocess import cuts


def put(tree: Any, shardings: Any) -> Any:
    """Host values onto a mesh of several processes; of a batch only the rows that live here are touched."""
    return jax.tree.map(_put, tree, shardings)


def _put(value: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(value), sharding))
    value = np.asarray(value)
    if sharding.spec != axes.spec(BATCH_LOGICAL):
        return place({"": value}, sharding)[""]
    rows = local_rows(sharding, value.shape, 1)
    return place({"": value[:, rows]}, sharding, rows, 1, value.shape[1])[""]


def get(tree: Any) -> Any:
    """The whole of every array, on every process."""
    whole = gather(jax.tree.leaves(tree)[0].sharding.mesh)(tree)
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), whole)


@functools.cache
def gather(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def placed_text(text: Path) -> dict[str, Any]:
    """Per layout: the rows this process read, and the first global batches as they lie on the mesh."""
    corpus = prepare(cuts.data_config(text))  # both processes at once, on one cache
    found = {}
    for name, (config, order) in cuts.LAYOUTS.items():
        mesh = axes.make_mesh(config, [jax.devices()[index] for index in order])
        sharding = axes.sharding(mesh, BATCH_LOGICAL)
        rows = local_rows(sharding, (cuts.ACCUMULATION, cuts.BATCH, grid.POSITIONS + 1), 1)
        loader = load(corpus, rows)
        found[name] = rows, [get(place(next(loader), sharding, rows, 1, cuts.BATCH)) for _ in range(cuts.STEPS)]
        loader.close()
    return found


def load(corpus: Any, rows: Any) -> TrainLoader:
    return TrainLoader(
        corpus, accumulation=cuts.ACCUMULATION, batch_size=cuts.BATCH, rows=rows, seed=cuts.SEED, num_threads=1
    )


def steps(text: Path, mesh_config: axes.MeshConfig, num_devices: int) -> dict[str, Any]:
    """Train steps on the text: the metrics of each, and the parameters after the last."""
    config = cuts.run_config(text, mesh_config)
    mesh = axes.make_mesh(config.mesh, jax.devices()[:num_devices])
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    sharding = axes.sharding(mesh, BATCH_LOGICAL)
    rows = local_rows(sharding, (cuts.ACCUMULATION, cuts.BATCH, grid.POSITIONS + 1), 1)
    loader = load(prepare(config.data), rows)
    with jax.set_mesh(mesh):
        shardings = state_shardings(config, model, tx, mesh)
        state = create_state(config, tx, shardings)
        step = jit_step(config, model, tx, mesh, shardings)
        metrics = []
        for _ in range(cuts.STEPS):
            state, found = step(state, place(next(loader), sharding, rows, 1, cuts.BATCH))
            metrics.append(get(found))
        loader.close()
        return {"metrics": metrics, "params": get(state.params)}


def main(port: str, index: str, folder: str, text: str) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", cuts.PROCESSES, int(index), initialization_timeout=60, heartbeat_timeout_seconds=20
    )
    assert jax.process_count() == cuts.PROCESSES and jax.device_count() == cuts.DEVICES
    assert jax.local_device_count() == cuts.DEVICES // cuts.PROCESSES

    def write(name: str, found: Any) -> None:
        (Path(folder) / f"{name}.{index}").write_bytes(pickle.dumps(found))

    for cut, alone in zip(cuts.CUTS, cuts.ALONE, strict=True):
        write(str(cut), grid.measure(cut, put=put, get=get, alone=alone))
    write("noisy", grid.measure(cuts.NOISY, put=put, get=get, alone=cuts.ALONE[0]))
    write("text", placed_text(Path(text)))
    write("steps", steps(Path(text), cuts.LAYOUTS["fsdp 4 tensor 2"][0], cuts.DEVICES))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
