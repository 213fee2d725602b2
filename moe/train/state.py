"""TrainState: everything a run carries from step to step, as one pytree, and where it lies on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import axes, param
from moe.config import ConfigError
from moe.models import Decoder
from moe.models.remat import HOST
from moe.train.memory import check_memory_kinds
from moe.train.run import RunConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    params: Any
    """float32 master parameters, a nested dict."""
    balance: dict[str, Any]
    """State of each balance rule, by its name; the expert bias lives here."""
    opt_state: Any
    step: jax.Array
    """int32 batches consumed: the data position too, but for what rollbacks skipped (`Session.offset`)."""
    key: jax.Array
    """The run's random key; never changes, everything folds the step into it."""
    skipped: jax.Array
    """int32 updates skipped so far because loss or gradient was not finite."""
    skipped_in_row: jax.Array
    """int32 of these, how many without a good one since."""
    idle_LE: jax.Array | None
    """int32 updates since each expert of each MoE layer last received a token; None without such a layer."""


def make_optimizer(config: RunConfig, model: Decoder) -> optax.GradientTransformation:
    """The optimizer for the model's parameters (abstract values will do)."""
    return config.optim.build(param.pure(model), decays(model), config.steps)


def decays(model: Decoder) -> Any:
    """For every parameter whether it decays: those with at least two logical dimensions."""
    return jax.tree.map(lambda part: len(part) > 1, param.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))


def init_state(config: RunConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state at step 0."""
    init_key, run_key = jax.random.split(key)
    params = param.pure(config.model.build(init_key))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        balance={rule.name: rule.init_state(config.model.exists_LE) for rule in config.balance},
        opt_state=tx.init(params),
        step=zero,
        key=run_key,
        skipped=zero,
        skipped_in_row=zero,
        idle_LE=jnp.zeros(config.model.exists_LE.shape, jnp.int32) if config.model.num_moe_layers else None,
    )


def state_shardings(config: RunConfig, model: Decoder, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A NamedSharding for every leaf: parameters and their moments by the table, the rest replicated.

    Moments that the config offloads are of the memory kind `pinned_host`; ConfigError if the devices have none.
    """
    abstract = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))
    params = param.shardings(model, mesh)
    _check_divisible(abstract.params, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    everything = jax.tree.map(lambda _: replicated, abstract)
    check_memory_kinds(config, mesh)
    moments = jax.tree.map(lambda s: s.with_memory_kind(HOST), params) if config.optim.offload else params
    opt_state = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, abstract.opt_state, moments, transform_non_params=lambda _: replicated
    )
    return dataclasses.replace(everything, params=params, opt_state=opt_state)


def create_state(config: RunConfig, tx: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state at step 0, made in place on the mesh: no device ever holds a whole parameter it should not."""
    return jax.jit(lambda key: init_state(config, tx, key), out_shardings=shardings)(jax.random.key(config.seed))


def _check_divisible(params: Any, shardings: Any) -> None:
    def one(path: Any, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> None:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = ".".join(str(getattr(key, "key", key)) for key in path)
            pieces = tuple(1 if part is None else axes.size(sharding.mesh, part) for part in sharding.spec)
            raise ConfigError(
                f"mesh = {axes.used(sharding.mesh)}: cannot cut parameter {name} of shape {leaf.shape} into {pieces}"
                " pieces"
            ) from None

    jax.tree_util.tree_map_with_path(one, params, shardings)
