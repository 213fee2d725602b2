"""Eight simulated CPU devices and cheap compilation for every test, and the tiny batch most of them use."""

import os

import pytest

# Compilation is what tests pay for, not execution: no LLVM optimisation. Put back once the backend has read it, so that
# processes started by a test run as a person would run them.
_flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_flags or ''} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
assert len(jax.devices()) == 8
if _flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = _flags

pytest.register_assert_rewrite("tests.grid")
