"""One of several processes:  python -m tests.multiprocess.layout_worker PORT INDEX FOLDER PROCESSES

Takes the step of the layouts of that many processes over its own devices and those of the others; writes FOLDER/INDEX.
"""

import pickle
import sys
from pathlib import Path

import jax

from moe.dispatch import AllToAllConfig
from moe.models.pipeline import PipelineConfig
from tests import layouts
from tests.layouts import Layout
from tests.multiprocess.worker import get, put

# Neighbouring devices share a process: in each of these something else than the batch crosses processes. Two processes
# are two stages, each whole; four cut what the two do and the stages as well. What else two may share is in `cuts`.
STAGED = Layout(
    mesh=(("stages", 2), ("fsdp", 2), ("context", 2), ("expert", 4)),
    exchange=AllToAllConfig(), pipeline=PipelineConfig(microbatches=4), accumulation=2,
)  # fmt: skip
LAYOUTS = {
    2: (STAGED,),
    4: (
        Layout(mesh=(("fsdp", 8), ("expert", 8)), exchange=AllToAllConfig()),
        Layout(mesh=(("fsdp", 2), ("context", 4), ("expert", 4), ("expert_tensor", 2)), attend="ring", remat="full"),
        STAGED,
    ),
}


def main(port: str, index: str, folder: str, processes: str) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(index), initialization_timeout=60, heartbeat_timeout_seconds=20
    )
    assert jax.process_count() == int(processes) and jax.device_count() == layouts.DEVICES
    found = [layouts.measure(layout, put, get) for layout in LAYOUTS[int(processes)]]
    (Path(folder) / index).write_bytes(pickle.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
