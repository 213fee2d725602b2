"""The update in tiles, with moments on the device or on the host: operation by operation the plain one.

A compiler may contract a product and a sum into one rounding or not, and does so otherwise in a loop: compiled, moments
are the plain ones bit for bit, parameters to the last bit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.models.remat import HOST
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.optim.tiled import tile_of
from moe.train.run import RunConfig
from moe.train.state import make_optimizer, state_shardings
from moe.train.step import optimized
from tests import grid
from tests.collectives import collectives

PLAIN = AdamWConfig(
    schedule=WarmupCosineConfig(warmup_steps=2), clip_norm=0.5, lr_scale=(("router", 0.0), ("embedding", 0.5))
)
STEPS = 3
CUT = {"fsdp": 2, "context": 2, "tensor": 2, "expert": 4}
WAYS: dict[str, tuple[AdamWConfig, dict[str, int]]] = {
    "tiles": (dataclasses.replace(PLAIN, tile=300), {}),
    "tiles of one row": (dataclasses.replace(PLAIN, tile=1), {}),
    "tiles on the host": (dataclasses.replace(PLAIN, tile=2000, offload=True), {}),
    "tiles on the host, eight devices": (dataclasses.replace(PLAIN, tile=64, offload=True), CUT),
}


def config(optim: AdamWConfig, mesh: dict[str, int] | None = None) -> RunConfig:
    return RunConfig(batch_size=16, steps=10, model=grid.model_config(), optim=optim, mesh=MeshConfig(**mesh or {}))


def program(run: RunConfig) -> tuple[Any, Any, Any]:
    """(the compiled update of (state, grads, keep), parameters and optimizer state at the start, gradients)."""
    mesh = axes.make_mesh(run.mesh, None if run.mesh != MeshConfig() else jax.devices()[:1])
    model = run.model.abstract()
    tx = make_optimizer(run, model)
    shardings = state_shardings(run, model, tx, mesh)
    rest = grid.train_state(())
    params = jax.device_put(rest.params, shardings.params)
    grads = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32), params)

    def update(params: Any, opt_state: Any, grads: Any, keep: jax.Array) -> Any:
        state = dataclasses.replace(rest, params=params, opt_state=opt_state)
        return optimized(run, model, tx, state, grads, keep)

    both = shardings.params, shardings.opt_state
    with jax.set_mesh(mesh):
        start = params, jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
        grads = jax.device_put(grads, shardings.params)
        jitted = jax.jit(update, in_shardings=(*both, shardings.params, None), out_shardings=both)
        return jitted.lower(*start, grads, True).compile(), start, grads


def updated(run: RunConfig, keeps: tuple[bool, ...] = (True,) * STEPS) -> Any:
    compiled, state, grads = program(run)
    for keep in keeps:
        state = compiled(*state, grads, jnp.bool_(keep))
    return state


def same_bits(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_operation_by_operation_an_update_in_tiles_is_the_plain_one_bit_for_bit() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    params, grads, decay = {}, {}, {"embedding": True, "router": True, "stack": False}
    for name, shape in {"embedding": (6, 4), "router": (4, 3), "stack": (2, 2, 3)}.items():
        params[name], grads[name] = (jax.random.normal(key, shape) for key in keys[:2])
    tx = PLAIN.build(params, decay, 10)
    tiled = dataclasses.replace(PLAIN, tile=8)
    state = found = params, tx.init(params)
    with jax.disable_jit():
        for step in range(2):
            now = jax.tree.map(lambda g, step=step: g * (step + 0.7), grads)
            updates, after = tx.update(now, state[1], state[0])
            state = optax.apply_updates(state[0], updates), after
            found = tiled.update_tiles(now, found[1], found[0], jnp.bool_(True), decay=decay, steps=10, specs=decay)
    assert (state[0]["stack"] != params["stack"]).all() and (state[0]["router"] == params["router"]).all()
    same_bits(found, state)


@functools.cache
def plain() -> Any:
    return updated(config(PLAIN))


@functools.cache
def in_tiles() -> Any:
    return updated(config(WAYS["tiles"][0]))


@pytest.mark.parametrize("way", WAYS)
def test_compiled_every_way_is_the_plain_update(way: str) -> None:
    optim, mesh = WAYS[way]
    params, state = in_tiles() if way == "tiles" else updated(config(optim, mesh))
    if mesh:  # the norm is summed in another order
        grid.close_trees(state, plain()[1], "state")
    else:
        same_bits(state, plain()[1])
    grid.close_trees(params, plain()[0], "parameters", tolerance=2e-7)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {HOST if optim.offload else "device"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)} == {"device"}


def test_a_refused_update_leaves_everything_as_it_was() -> None:
    keeps = (True, False, True, False, True)
    same_bits(updated(config(WAYS["tiles"][0]), keeps), in_tiles())


def test_tiles_move_nothing_between_devices() -> None:
    compiled, _, _ = program(config(*WAYS["tiles on the host, eight devices"]))
    sent = collectives(compiled.as_text())
    assert {one.array for one in sent} == {"f32 1"}, "more than the squares of the norm"


def test_a_tile_is_the_largest_that_divides() -> None:
    assert tile_of((6, 4, 5), 50) == (2, 4, 5)
    assert tile_of((6, 4, 5), 0) == (6, 4, 5)
    assert tile_of((2, 3, 4, 5), 60) == (1, 3, 4, 5)
    assert tile_of((2, 4, 4, 5), 59) == (1, 2, 4, 5)
    assert tile_of((12, 5), 21) == (4, 5)
    assert tile_of((7,), 3) == (1,) and tile_of((8,), 5) == (4,)
    assert tile_of((3, 10, 10), 99) == (1, 10, 10)  # the least


def test_moments_on_the_host_need_a_size_of_tiles() -> None:
    with pytest.raises(ConfigError, match="tile = 0: must be at least 1 with offload"):
        check(AdamWConfig(offload=True))
