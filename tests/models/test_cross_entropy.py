"""The loss in chunks of tokens against the whole logits: values, gradients, memory, what is sent.

Guards against: logits gathered over the vocabulary's shards (a [B, S, V] array on every device), one reduction of the
head's gradient per chunk, the gradient of tokens that only fill up the last chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.models.ahead import AheadConfig
from moe.models.output import nats
from moe.train.run import RunConfig
from tests import grid
from tests.collectives import Sent, collectives
from tests.models.test_ahead import gradient as of_model

B, S, D, V = 8, 24, 16, 40
MESHES = {
    "data 8": {"data": 8},
    "tensor 8": {"data": 1, "tensor": 8},
    "fsdp, context, tensor": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2, "expert": 4},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "stages, fsdp, tensor": {"stages": 2, "data": 1, "fsdp": 2, "tensor": 2},
    "stages, data": {"stages": 4, "data": 2},
}


@functools.cache
def inputs() -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (B, S, D)), jax.random.normal(keys[1], (D, V))
    target, real = jax.random.randint(keys[2], (B, S), 0, V), jax.random.bernoulli(keys[3], 0.8, (B, S))
    return hidden, 3.0 * head, target, real


def gradient(chunk: int) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *inputs: 0.3 * nats(*inputs, chunk), argnums=(0, 1))


@functools.cache
def expected() -> Any:
    return jax.device_get(jax.jit(gradient(0))(*inputs()))


def agree(found: Any, tolerance: float = 1e-6) -> None:
    for part, other, name in zip(jax.tree.leaves(found), jax.tree.leaves(expected()), ("nats", "h", "W"), strict=True):
        grid.close(part, other, name, tolerance)


@pytest.mark.parametrize("chunk", [7, 64, 1000])  # leaves a rest of 3, divides, more than there are
def test_chunks_give_the_loss_and_gradient_of_the_whole(chunk: int) -> None:
    agree(jax.jit(gradient(chunk))(*inputs()))
    np.testing.assert_allclose(0.3 * jax.jit(nats, static_argnums=4)(*inputs(), chunk), expected()[0], rtol=1e-6)


def test_whole_logits_are_the_sum_by_hand() -> None:
    hidden, head, target, real = (np.asarray(value) for value in inputs())
    total = 0.0
    for b in range(B):
        for s in range(S):
            logits = hidden[b, s].astype(np.float64) @ head
            total += real[b, s] * (np.log(np.exp(logits).sum()) - logits[target[b, s]])
    np.testing.assert_allclose(expected()[0], 0.3 * total, rtol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, target, real = inputs()
    for found in (jax.jit(gradient(chunk))(100 * hidden, head, target, real) for chunk in (0, 7)):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@functools.cache
def compiled(mesh: str, chunk: int) -> tuple[Any, Any]:
    """(compiled value and gradient, its placed inputs)."""
    where = axes.make_mesh(MeshConfig(**MESHES[mesh]))
    names = (("batch", "stream", None), ("embed", "vocab"), ("batch", None), ("batch", None))
    placed = [jax.device_put(x, axes.sharding(where, part)) for x, part in zip(inputs(), names, strict=True)]
    with jax.set_mesh(where):
        run = jax.jit(gradient(chunk), out_shardings=(None, tuple(x.sharding for x in placed[:2])))
        return run.lower(*placed).compile(), placed


@pytest.mark.parametrize("mesh", MESHES)
def test_every_cut_gives_the_same_loss_and_gradient(mesh: str) -> None:
    run, placed = compiled(mesh, 7)
    agree(jax.device_get(run(*placed)))


def test_what_is_sent_does_not_grow_with_the_number_of_chunks_but_three_numbers_a_token() -> None:
    """fsdp 2, context 2, tensor 2: a device has 4 x 12 tokens, a quarter of the rows of W and half of its columns."""
    run, _ = compiled("fsdp, context, tensor", 7)
    tokens, chunks, rest = 48, 7, 49
    found = collectives(run.as_text())
    in_loop = {one: count for one, count in found.items() if one.times == chunks}
    assert {one.kind for one in in_loop} == {"all-reduce"} and rest == 7 * chunks > tokens
    assert sum(count * int(one.array.split()[1]) for one, count in in_loop.items()) == 3 * 7
    once = {one: count for one, count in found.items() if one not in in_loop and one.array != "f32 1"}
    mask = [one for one in once if one.array.startswith("pred") or one.array.startswith("s32")]
    assert not mask, "targets are cut like the batch and need not travel"
    assert once == {
        Sent("all-gather", f"f32 {D * V // 2}", 1): 1, Sent("all-gather", f"f32 {tokens * D}", 1): 1,
        Sent("reduce-scatter", f"f32 {D * V // 8}", 1): 1, Sent("reduce-scatter", f"f32 {tokens * D // 2}", 1): 1,
        Sent("all-reduce", f"f32 {D * V // 8}", 1): 1,  # over data, which has one member here
    }  # fmt: skip


def test_the_stages_of_a_pipeline_share_the_tokens() -> None:
    run, _ = compiled("stages, fsdp, tensor", 1000)
    tokens = B * S // 4  # over stages and fsdp
    assert f"f32[{tokens},{V // 2}]" in run.as_text() and f"f32[{2 * tokens},{V // 2}]" not in run.as_text()


def test_stages_that_do_not_divide_the_sequences_compute_the_same() -> None:
    hidden, head, target, real = inputs()
    few = hidden[:4], head, target[:4], real[:4]
    with jax.set_mesh(axes.make_mesh(MeshConfig(stages=4, data=2))):
        found = jax.device_get(jax.jit(gradient(7))(*few))
    grid.close_trees(found, jax.device_get(jax.jit(gradient(0))(*few)), "loss", 1e-6)


def test_the_vocabulary_stays_cut() -> None:
    run, _ = compiled("tensor 8", 7)
    assert f"f32[7,{V // 8}]" in run.as_text() and f",{V}]" not in run.as_text()


def test_chunks_take_less_memory() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((4, 64, 8), jnp.float32), ((8, 512), jnp.float32), ((4, 64), jnp.int32), ((4, 64), bool)
    )]  # fmt: skip
    logits = 4 * 4 * 64 * 512

    def temporaries(chunk: int) -> int:
        return jax.jit(gradient(chunk)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < logits / 4 < logits <= temporaries(0)


def test_bfloat16_rounds_products_alone() -> None:
    hidden, head, target, real = inputs()
    loss, (d_hidden, d_head) = jax.jit(gradient(7))(hidden.astype(jnp.bfloat16), head, target, real)
    assert (loss.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    agree((loss, (d_hidden, d_head)), 1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_blocks_that_predict_further_ahead_learns_the_same_in_chunks(tied: bool) -> None:
    whole = grid.model_config(ahead=AheadConfig(depth=1, coefficient=0.5), tie_embeddings=tied, num_layers=1)
    params = jax.jit(lambda: param.pure(whole.build(jax.random.key(0))))()
    found = {}
    for chunk in (0, 50):
        config = dataclasses.replace(whole, logit_chunk=chunk)
        run = RunConfig(batch_size=8, balance=(), steps=200, model=config)
        arrays = {name: value[:8] for name, value in grid.batch().items()}
        found[chunk] = of_model(run, config.abstract(), arrays, 2, params)[:2]
    grid.close_trees(found[50], found[0], "loss and gradient")


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logit_chunk = -1: must be at least 0"):
        check(grid.model_config(logit_chunk=-1))
