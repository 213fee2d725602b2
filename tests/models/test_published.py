"""What published models need of the decoder, and their reference configs in small: trained on 8 devices as on one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import reference
from moe import axes, param
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.dispatch import AllToAllConfig
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.layers.norm import RMSNorm
from moe.models import DecoderConfig
from moe.models.ahead import AheadConfig
from moe.models.layout import StackConfig
from moe.models.sample import init_cache
from moe.routing.base import Context
from moe.train.run import RunConfig
from moe.train.state import init_state, make_optimizer
from moe.train.step import BATCH_LOGICAL, batch_gradient
from tests import grid
from tests.grid_batch import VOCAB, batch

TINY = DecoderConfig(
    vocab_size=11, width=8, num_layers=1, attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_width=4),
    moe=MoEConfig(num_experts=4, expert_hidden=4),
)  # fmt: skip


@pytest.mark.parametrize("norm", ["pre", "sandwich"])
def test_the_epsilon_reaches_every_norm_of_the_stream(norm: Any) -> None:
    config = dataclasses.replace(TINY, norm=norm, norm_eps=1e-5, ahead=AheadConfig())
    norms = {path: part.eps for path, part in nnx.iter_graph(config.abstract()) if isinstance(part, RMSNorm)}
    # A layer's two sublayers, those of the block of `ahead`, its merge's two and the final one.
    assert len(norms) == (4 if norm == "pre" else 8) + 2 + 1
    assert set(norms.values()) == {1e-5}


def test_embeddings_are_scaled_by_the_root_of_the_width_or_not() -> None:
    token = jnp.array([[3, 7]])
    table = jnp.asarray(np.random.default_rng(0).normal(size=(11, 8)), jnp.float32)
    for scale, factor in ((True, 8**0.5), (False, 1.0)):
        model = dataclasses.replace(TINY, scale_embedding=scale).abstract()
        bound = param.bind(model, param.pure(model) | {"embedding": table})
        np.testing.assert_allclose(bound.embed(token)[0], factor * table[jnp.array([3, 7])], rtol=1e-6)


def test_an_epsilon_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.norm_eps = 0\.0: must be greater than 0"):
        check(dataclasses.replace(TINY, norm_eps=0.0), "model")


def small_layer(config: Any) -> Any:
    """A sublayer of a reference config with small sizes; what it does is left alone."""
    small: dict[str, Any] = {
        "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "query_latent": 16, "key_value_latent": 8, "rope_width": 4,
        "value_width": 6, "hidden": 16, "num_experts": 16, "expert_hidden": 8,
    }  # fmt: skip
    small["exchange"] = AllToAllConfig()  # a budget drops, and what it drops depends on the mesh
    here = {field.name: small[field.name] for field in dataclasses.fields(config) if field.name in small}
    if isinstance(config, MoEConfig):
        router = dataclasses.replace(config.router, num_selected=4, init_std=0.3)  # type: ignore[call-arg]
        here |= {"router": router, "shared_hidden": 8 if config.shared_hidden else 0}
    return dataclasses.replace(config, **here)


def small(config: RunConfig) -> RunConfig:
    model = config.model
    changes: dict[str, Any] = {"vocab_size": VOCAB, "width": 32, "compute_dtype": "float32", "init_std": 0.1}
    if model.stacks:
        stacks = [StackConfig(layers=tuple(map(small_layer, stack.layers)), repeats=1) for stack in model.stacks]
        changes["stacks"] = tuple(stacks)
    else:
        changes |= {"num_layers": 2, "attention": small_layer(model.attention), "moe": small_layer(model.moe)}
    model = dataclasses.replace(model, **changes)
    return dataclasses.replace(config, model=model, batch_size=8, accumulation=1, mesh=MeshConfig(data=1), steps=10**6)


def gradient(config: RunConfig, mesh_config: MeshConfig) -> tuple[Any, Any, Any]:
    """Loss, gradient and load of one small batch."""
    mesh = axes.make_mesh(mesh_config, jax.devices()[: mesh_config.num_devices])
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    state = jax.jit(lambda: init_state(config, tx, jax.random.key(0)))()
    state = dataclasses.replace(
        state, params=jax.device_put(jax.device_get(state.params), param.shardings(model, mesh)), opt_state=()
    )
    arrays = {
        name: jax.device_put(value[None], axes.sharding(mesh, BATCH_LOGICAL))
        for name, value in batch(sequences=8).items()
    }
    with jax.set_mesh(mesh):
        loss, grads, share = jax.jit(lambda *a: batch_gradient(config, model, *a))(state, arrays)
    return jax.device_get((loss, grads, share.statistics.count_BE))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_57b"])
def test_a_reference_config_in_small_trains_on_eight_devices_as_on_one(name: str) -> None:
    config = small(getattr(reference, name)())
    check(config)
    loss, grads, load = gradient(config, MeshConfig(data=1))
    found_loss, found_grads, found_load = gradient(config, MeshConfig(data=1, fsdp=2, context=2, tensor=2, expert=4))
    np.testing.assert_array_equal(found_load, load)
    grid.close(found_loss, loss, "loss")
    grid.close_trees(found_grads, grads, "gradient")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert float(np.abs(leaf).max()) > 0, f"no gradient for {jax.tree_util.keystr(path)}"


def test_deepseek_v3_in_small_decodes_with_its_cache_as_it_reads() -> None:
    model = small(reference.deepseek_v3()).model
    params = jax.jit(lambda: param.pure(model.build(jax.random.key(0))))()
    bound, token = param.bind(model.abstract(), params), jnp.asarray(batch(sequences=2, positions=6)["tokens"][:, :6])
    bias_LE = jnp.zeros(model.exists_LE.shape)

    def context(token_BS: jax.Array, start: int) -> Context:
        position = jnp.broadcast_to(start + jnp.arange(token_BS.shape[1], dtype=jnp.int32), token_BS.shape)
        zeros = jnp.zeros_like(token_BS)
        return Context(
            token_BS=token_BS, segment_BS=zeros + 1, position_BS=position, task_BS=zeros, sequence_B=zeros[:, 0],
            step=jnp.int32(0), key=jax.random.key(0),
        )  # fmt: skip

    whole = jax.jit(lambda: bound(context(token, 0), bias_LE)[0])()
    read = jax.jit(lambda *given: bound.decode(given[0], bias_LE, given[1]))
    caches, start = init_cache(bound, 2, 8, jnp.float32), 0
    assert [leaf.shape for leaf in caches[1][0]] == [(1, 2, 8, 8), (1, 2, 8, 4), (1,)]  # latents and one key
    for end in (3, 6):
        logits, caches = read(context(token[:, start:end], start), caches)
        np.testing.assert_allclose(logits, whole[:, end - 1], rtol=1e-4, atol=2e-5)
        start = end
