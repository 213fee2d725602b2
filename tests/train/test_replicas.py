"""Devices that hold the same part of the state must hold the same bits, and who does not is named."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from moe.train.failures import Diverged
from moe.train.replicas import check_replicas
from moe.train.state import TrainState
from tests.train.small_state import mesh_of, placed, shardings

NAMES = ("step", "skipped", "skipped_in_row", "idle_LE")
WHERE = shardings(mesh_of(jax.devices()))


def corrupted(leaf: jax.Array, devices: dict[int, int]) -> jax.Array:
    """The leaf with the lowest bit of the last element turned on these devices, by their index: (index, element)."""
    parts = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id in devices:
            part.view(f"u{part.dtype.itemsize}").reshape(-1)[devices[shard.device.id]] ^= 1
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def with_bias(state: TrainState, bias_LE: Any) -> TrainState:
    return dataclasses.replace(state, balance={"bias": {"bias_LE": bias_LE}})


def test_a_state_whose_replicas_agree_passes() -> None:
    check_replicas(placed(3, WHERE))
    check_replicas({"alone": jax.device_put(np.ones(3), jax.devices()[1])})


def test_one_device_with_another_bit_is_named() -> None:
    state = placed(3, WHERE)
    bad = with_bias(state, corrupted(state.balance["bias"]["bias_LE"], {5: -1}))
    with pytest.raises(Diverged, match=re.escape("balance.bias.bias_LE: device 5 (process 0) differs from 7 others")):
        check_replicas(bad)


def test_a_leaf_that_is_cut_has_no_replicas() -> None:
    state = placed(3, WHERE)
    check_replicas(dataclasses.replace(state, params=state.params | {"w": corrupted(state.params["w"], {5: -1})}))


def test_of_a_leaf_cut_over_one_axis_the_replicas_of_each_part_are_compared() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = jax.device_put(np.arange(32.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b")))
    check_replicas([cut])
    message = "0: device 2 (process 0) against device 6 (process 0)"
    with pytest.raises(Diverged, match=re.escape(message)):
        check_replicas([corrupted(cut, {6: 0})])


def test_without_a_majority_both_sides_are_named_and_many_leaves_are_counted() -> None:
    state = placed(3, WHERE)
    half = dict.fromkeys(range(4), 0)
    scalars: dict[str, Any] = {name: corrupted(getattr(state, name), half) for name in NAMES}
    with pytest.raises(Diverged) as caught:
        check_replicas(dataclasses.replace(state, **scalars))
    said = str(caught.value)
    assert "step: device 0 (process 0), device 1 (process 0)" in said and " against device 4 (process 0)" in said
    assert said.endswith("and 1 more")
