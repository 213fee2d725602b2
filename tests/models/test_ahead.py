"""Multi-token prediction: by hand with loops, causal, on every cut, and gone when text is generated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.models import Decoder
from moe.models.ahead import AheadConfig, real_targets_ahead, targets_ahead
from moe.models.output import token_losses
from moe.models.sample import generate
from moe.routing.base import Context
from moe.train.run import RunConfig
from moe.train.step import batch_gradient
from tests import grid
from tests.oracle import context_of

DEPTH = 2
CONFIG = grid.model_config(ahead=AheadConfig(depth=DEPTH, coefficient=0.5))


def built() -> Decoder:
    return CONFIG.build(jax.random.key(0))


def bias() -> jax.Array:
    return jnp.zeros((CONFIG.num_moe_layers, grid.EXPERTS))


def short() -> dict[str, np.ndarray]:
    return {name: value[:8] for name, value in grid.batch().items()}


def test_targets_are_the_tokens_further_ahead_inside_the_document() -> None:
    segment = np.array([[1, 1, 1, 1, 2, 2, 0]])
    tokens = np.arange(7)[None]
    np.testing.assert_array_equal(targets_ahead(jnp.asarray(tokens), 1), [[2, 3, 4, 5, 6, 0]])
    np.testing.assert_array_equal(real_targets_ahead(jnp.asarray(segment), 1), [[1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(real_targets_ahead(jnp.asarray(segment), 2), [[1, 0, 0, 0, 0, 0]])
    whole = jnp.ones((1, 5), jnp.int32)
    np.testing.assert_array_equal(real_targets_ahead(whole, 1), [[1, 1, 1, 0]])  # the last input has no token after it


def test_the_blocks_are_counted_as_layers_behind_the_trunk() -> None:
    assert CONFIG.exists_LE.shape == (grid.LAYERS + DEPTH, grid.EXPERTS)
    _, stats = built()(context_of(short()), bias())
    assert stats is not None and stats.count_BE.shape[0] == grid.LAYERS + DEPTH
    segment = short()["segment_ids"][:, :-1]
    for offset in range(1, DEPTH + 1):
        expected = ((segment[:, offset:] == segment[:, :-offset]) & (segment[:, offset:] > 0)).sum(axis=1)
        np.testing.assert_array_equal(stats.tokens_B[grid.LAYERS + offset - 1], expected)


def test_the_trunk_is_what_it_is_without_them() -> None:
    plain = dataclasses.replace(CONFIG, ahead=None)
    params = param.pure(built())
    trunk = {key: value for key, value in params.items() if key != "merges"}
    trunk["stacks"] = {key: value for key, value in params["stacks"].items() if int(key) < len(plain.layout)}
    context = context_of(short())
    expected, _ = param.bind(plain.abstract(), trunk)(context, bias()[: grid.LAYERS])
    np.testing.assert_allclose(built()(context, bias())[0], expected, atol=1e-5)


def test_a_block_reads_the_next_token_and_none_after_it() -> None:
    arrays = {name: np.ones_like(value[:1]) for name, value in grid.batch().items()}
    arrays["positions"] = np.arange(grid.POSITIONS + 1)[None]
    arrays["tokens"] = np.random.default_rng(0).integers(0, grid.VOCAB, arrays["tokens"].shape)
    changed = dict(arrays, tokens=arrays["tokens"].copy())
    changed["tokens"][0, 8] += 1
    model = built()
    before, after = (model.predict(context_of(one), bias()).later for one in (arrays, changed))
    for offset, (a, b) in enumerate(zip(before, after, strict=True), 1):
        np.testing.assert_allclose(a[0, : 8 - offset], b[0, : 8 - offset], atol=1e-5)
        assert np.abs(a[0, 8 - offset] - b[0, 8 - offset]).max() > 1e-4, "the token it should read has no effect"


def gradient(
    config: RunConfig, model: Decoder, arrays: dict[str, np.ndarray], accumulation: int, params: Any = None
) -> Any:
    state = dataclasses.replace(grid.train_state(()), params=param.pure(built()) if params is None else params)
    cut = {n: jnp.asarray(v).reshape(accumulation, -1, v.shape[-1]) for n, v in arrays.items()}
    return jax.jit(lambda state, arrays: batch_gradient(config, model, state, arrays))(state, cut)


def test_the_loss_is_the_mean_over_blocks_by_hand_and_does_not_depend_on_accumulation() -> None:
    arrays = short()
    config = RunConfig(batch_size=8, balance=(), steps=200, model=CONFIG)
    loss, grads, share = gradient(config, CONFIG.abstract(), arrays, 1)
    state = grid.train_state(())
    model = built()
    found = model.predict(context_of(arrays, key=state.key, step=int(state.step)), bias())
    later = [model.logits(hidden) for hidden in found.later]
    segment, tokens, total, targets = arrays["segment_ids"], arrays["tokens"], 0.0, 0
    for b in range(8):
        for t in range(grid.POSITIONS):
            targets += segment[b, t] > 0 and segment[b, t] == segment[b, t + 1]
            for offset, logits in enumerate(later, 1):
                end = t + offset + 1
                if end <= grid.POSITIONS and 0 < segment[b, t] == segment[b, end]:
                    target = jnp.full((1, 1), tokens[b, end])
                    total += float(token_losses(logits[b, t][None, None], target)[0, 0])
    np.testing.assert_allclose(share.later.sum(), total / targets / DEPTH, rtol=1e-5)
    np.testing.assert_allclose(loss, share.lm.sum() + 0.5 * share.later.sum(), rtol=1e-6)
    again, more, _ = gradient(dataclasses.replace(config, accumulation=4), CONFIG.abstract(), arrays, 4)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    grid.close_trees(more, grads, "gradient")
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads["merges"]))


def test_generation_leaves_them_out() -> None:
    model = built()
    prompt = np.random.default_rng(1).integers(0, grid.VOCAB, (2, 5)).astype(np.int32)
    params = param.pure(model)
    options: dict[str, Any] = {"num_tokens": 4, "temperature": 0.0, "top_p": 1.0, "key": jax.random.key(0), "eos": None}
    found = np.asarray(generate(CONFIG.abstract(), params, bias(), prompt, step=0, **options))
    tokens = np.concatenate([prompt, np.zeros((2, 4), np.int32)], axis=1)
    for end in range(5, 9):
        zeros, ones = jnp.zeros_like(jnp.asarray(tokens)), jnp.ones_like(jnp.asarray(tokens))
        context = Context(
            token_BS=jnp.asarray(tokens), segment_BS=ones, task_BS=zeros, sequence_B=jnp.arange(2), step=jnp.int32(0),
            position_BS=jnp.broadcast_to(jnp.arange(9), tokens.shape), key=jax.random.key(0),
        )  # fmt: skip
        tokens[:, end] = np.asarray(model(context, bias())[0])[:, end - 1].argmax(axis=-1)
    np.testing.assert_array_equal(found, tokens[:, 5:])


def test_a_config_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ahead.depth = 0: must be at least 1"):
        check(dataclasses.replace(CONFIG, ahead=AheadConfig(depth=0)))
