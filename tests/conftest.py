"""Eight simulated CPU devices and cheap compilation, before anything asks JAX for a device."""

import gc
import os
from collections.abc import Iterator

import jax
import pytest

# Compilation is what tests pay for, not running. A step of the invariance grid takes 9 s as shipped, 5.7 s of CPU time
# without LLVM optimisation, 3.0 s with the old emitters as well (a flag that jaxlib 0.12 refuses).
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    CHEAP += " --xla_cpu_use_fusion_emitters=false"


def _start_backend() -> None:
    """XLA reads its flags once, here; then they are put back, so that processes started by tests run as shipped."""
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{before or ''} {CHEAP}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    assert len(jax.devices()) == 8
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before


_start_backend()
pytest.register_assert_rewrite("tests.grid", "tests.oracle", "tests.routing.contract", "tests.routing.measuring")


@pytest.fixture(scope="module", autouse=True)
def _what_a_file_leaves_behind_is_not_looked_through_again() -> Iterator[None]:
    """JAX keeps what it traced and compiled: after some files millions of Python objects, and the collector walked
    through them all again and again, in long sessions half of the processor time. What a file leaves is collected once,
    so a file that nobody closed is still found, and then set aside.
    """
    yield
    gc.collect()
    gc.freeze()
