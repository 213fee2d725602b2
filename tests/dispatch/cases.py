"""Tokens, assignments and weights that the tests of dispatch share, and one compiled function for all cases."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe import axes
from moe.axes import MeshConfig
from moe.dispatch import DispatchConfig, ExchangeConfig, ExpertWeights, RingConfig, dispatch
from moe.dispatch.sharded import WEIGHT_AXES
from moe.routing.base import Routing

B, S, D, E, F, K = 8, 6, 8, 8, 4, 2
RING = RingConfig()

FOLDINGS = {
    "none": None,
    "1 device": {"data": 1},
    "data 2, expert 2": {"data": 2, "expert": 2},
    "data 8": {"data": 8},
    "data 8, expert 8": {"data": 8, "expert": 8},
    "data 2 fsdp 4, expert 2": {"data": 2, "fsdp": 4, "expert": 2},
    "fsdp 4 tensor 2, expert 2 2": {"fsdp": 4, "tensor": 2, "expert": 2, "expert_tensor": 2},
    "data 4 tensor 2, expert 2": {"data": 4, "tensor": 2, "expert": 2},
    "fsdp 2 tensor 4, expert 1 4": {"fsdp": 2, "tensor": 4, "expert_tensor": 4},
    "fsdp 2 context 2 tensor 2, expert 2 2": {"fsdp": 2, "context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
    "data 2 context 2 tensor 2, expert 8": {"data": 2, "context": 2, "tensor": 2, "expert": 8},
    "context 4 tensor 2, expert 4 2": {"context": 4, "tensor": 2, "expert": 4, "expert_tensor": 2},
    "data 2 fsdp 2 context 2, expert 4": {"data": 2, "fsdp": 2, "context": 2, "expert": 4},
    "fsdp 8, expert 2 4": {"fsdp": 8, "expert": 2, "expert_tensor": 4},
    "fsdp 2 tensor 2, expert 2 2": {"fsdp": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
}
"""Sizes of the dense grid, then `expert` and `expert_tensor`."""


def expert_weights(seed: int = 0) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    return ExpertWeights(*(0.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def listed(case: str) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(token [B, R], expert [B, R], K): K assignments a token, in order; some void. 'ragged' has no order and no K."""
    rng = np.random.default_rng(1)
    token = np.broadcast_to(np.repeat(np.arange(S), K), (B, S * K))
    experts = np.stack([np.stack([rng.permutation(E)[:K] for _ in range(S)]) for _ in range(B)]).reshape(B, S * K)
    if case == "two experts":
        experts = np.broadcast_to(np.tile([3, 5], S), (B, S * K))
    if case == "padded":
        experts = np.where((token >= 4) | (np.arange(B)[:, None] == 2), E, experts)
    if case == "ragged":  # tokens with no, one or many assignments, in any order
        token, experts = rng.integers(0, S, (B, S * K)), rng.integers(0, E + 1, (B, S * K))
    return token.astype(np.int32), experts.astype(np.int32), None if case == "ragged" else K


def routing(token_BR: Any, expert_BR: Any, weight_BR: jax.Array, num_selected: int | None) -> Routing:
    return Routing(
        token_BR=jnp.asarray(token_BR), expert_BR=jnp.asarray(expert_BR),
        weight_BR=jnp.where(jnp.asarray(expert_BR) < E, weight_BR, 0.0), probs_BSE=jnp.full((B, S, E), 1 / E),
        log_z_BS=jnp.zeros((B, S)), margin_BS=jnp.ones((B, S)), num_selected=num_selected,
    )  # fmt: skip


def token_choice(case: str, weight_BR: jax.Array) -> Routing:
    token, experts, selected = listed(case)
    return routing(token, experts, weight_BR, selected)


def inputs() -> tuple[Any, ...]:
    """(x, combine weights, expert weights)."""
    x = jax.random.normal(jax.random.key(5), (B, S, D))
    return x, jax.random.uniform(jax.random.key(6), (B, S * K), minval=0.1), expert_weights()


def mesh_of(sizes: dict[str, int]) -> jax.sharding.Mesh:
    config = MeshConfig(**({"data": 1} | sizes))
    return axes.make_mesh(config, jax.devices()[: config.num_devices])


def loss(config: DispatchConfig, exchange: ExchangeConfig, num_selected: int | None) -> Any:
    """A function of all outputs, of (x, combine weights, expert weights, token, expert) -> (value, (y, dropped))."""
    target = jax.random.normal(jax.random.key(7), (B, S, D))

    def value(x: jax.Array, combine: jax.Array, weights: ExpertWeights, token: Any, expert: Any) -> Any:
        listed = routing(token, expert, combine, num_selected)
        y, dropped = dispatch(config.build(), x, listed, weights, exchange)
        return (y * target).sum() + (y**2).sum(), (y, dropped)

    return value


def placed(mesh: jax.sharding.Mesh, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs as the table cuts them, assignments after them."""
    weights = ExpertWeights(*(axes.sharding(mesh, names) for names in WEIGHT_AXES))
    batch = axes.sharding(mesh, ("batch",))
    return jax.device_put(values, (batch, batch, weights, batch, batch))  # type: ignore[no-any-return]


@functools.cache
def _step(config: DispatchConfig, exchange: ExchangeConfig, num_selected: int | None) -> Any:
    return jax.jit(jax.value_and_grad(loss(config, exchange, num_selected), argnums=(0, 1, 2), has_aux=True))


@functools.cache
def run(config: DispatchConfig, case: str, folding: str = "none", exchange: ExchangeConfig = RING) -> tuple[Any, Any]:
    """((y, dropped), gradients in x, combine weights and expert weights)."""
    token, expert, selected = listed(case)
    values, step = (*inputs(), token, expert), _step(config, exchange, selected)
    if (sizes := FOLDINGS[folding]) is None:
        (_, out), grads = step(*values)
        return jax.device_get((out, grads))
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        (_, out), grads = step(*placed(mesh, values))
    return jax.device_get((out, grads))


def loop(case: str, void: np.ndarray | None = None) -> np.ndarray:
    """The output one assignment at a time, without those marked in `void` [B, R]."""
    x, combine, weights = inputs()
    token, experts, _ = listed(case)
    gate, up, down = (np.asarray(w, np.float64) for w in weights)
    x, combine = np.asarray(x, np.float64), np.asarray(combine, np.float64)
    y = np.zeros((B, S, D))
    for b, r in np.ndindex(experts.shape):
        t, e = token[b, r], experts[b, r]
        if e < E and (void is None or not void[b, r]):
            h = x[b, t] @ gate[e]
            y[b, t] += combine[b, r] * ((h / (1 + np.exp(-h)) * (x[b, t] @ up[e])) @ down[e])
    return y
