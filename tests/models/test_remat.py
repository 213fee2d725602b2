"""Recomputation by policy: what is kept, what is computed or sent again, and that no number changes.

That every policy keeps the routers' choice: tests/models/test_decoder.py.
"""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.models.remat import HOST, Remat, recomputed
from tests import grid, oracle

REMAT = get_args(Remat)
LAYERS, B, D = 3, 5, 4
SEEN: list[str] = []


def count(name: str, x: jax.Array) -> jax.Array:
    """The identity, which says when it is run."""

    def note(x: np.ndarray) -> np.ndarray:
        SEEN.append(name)
        return x

    return jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def counted(name: str, x: jax.Array) -> jax.Array:
    return count(name, x)


counted.defvjp(lambda name, x: (count(name, x), None), lambda name, _, g: (g,))


def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    """Stands for a repeat: attention, then an exchange of rows."""
    mixed = checkpoint_name(counted("attention", jnp.sin(x)), "attention")
    sent = checkpoint_name(counted("dispatched", jnp.sin(mixed * w)), "dispatched")
    back = checkpoint_name(counted("combined", jnp.sin(sent * w)), "combined")
    return jnp.sin(x + back), None


def gradient(remat: str) -> Any:
    def loss(x: jax.Array, w_L: jax.Array) -> jax.Array:
        return jax.lax.scan(recomputed(body, remat), x, w_L)[0].sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


TWICE = {
    "none": set(), "full": {"attention", "dispatched", "combined"}, "offload": {"attention", "dispatched", "combined"},
    "save_attention": {"dispatched", "combined"}, "collectives": {"attention"}, "attention_collectives": set(),
}  # fmt: skip


@pytest.mark.parametrize("remat", TWICE)
def test_what_a_policy_keeps_is_not_computed_again(remat: str) -> None:
    x, w_L = jnp.linspace(0, 1, B * D).reshape(B, D), jnp.linspace(0.5, 1, LAYERS)
    SEEN.clear()
    found = jax.block_until_ready(gradient(remat)(x, w_L))
    ran = {name: SEEN.count(name) for name in ("attention", "dispatched", "combined")}
    assert ran == {name: LAYERS * (2 if name in TWICE[remat] else 1) for name in ran}
    grid.close_trees(found, gradient("none")(x, w_L), "gradient", tolerance=1e-6)


def test_offloaded_inputs_lie_in_the_memory_of_the_host() -> None:
    shapes = jax.ShapeDtypeStruct((B, D), jnp.float32), jax.ShapeDtypeStruct((LAYERS,), jnp.float32)
    traced = {remat: str(gradient(remat).trace(*shapes).jaxpr) for remat in ("full", "offload")}
    assert f"float32<host>[{LAYERS},{B},{D}]" in traced["offload"].replace("f32", "float32"), HOST
    assert "<host>" not in traced["full"]


@functools.cache
def of_a_model(remat: Any) -> Any:
    config = grid.model_config(remat=remat, num_layers=2)
    arrays = {name: value[:4] for name, value in grid.batch().items()}
    context, bias = oracle.context_of(arrays), jnp.zeros((2, grid.EXPERTS))
    params = jax.jit(lambda: param.pure(config.build(jax.random.key(0))))()

    def loss(params: Any) -> jax.Array:
        logits, _ = param.bind(config.abstract(), params)(context, bias)
        return jnp.sin(logits).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return jax.device_get(compiled(params)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [remat for remat in REMAT if remat not in ("none", "dots", "full")])
def test_a_model_learns_the_same_with_every_policy(remat: str) -> None:
    grid.close_trees(of_a_model(remat)[0], of_a_model("none")[0], "value and gradient")


def test_a_policy_takes_the_memory_of_what_it_keeps() -> None:
    used = {remat: of_a_model(remat)[1] for remat in ("none", "save_attention", "full")}
    assert used["full"] < used["save_attention"] < used["none"]


def test_the_names_in_the_documentation_are_those_of_the_policies() -> None:
    import moe.models.remat as module

    lines = [line.split()[0] for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert set(REMAT) <= set(lines)
