"""Generation with the cache against recomputation of the whole sequence, and the sampling rules one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError
from moe.dispatch import DenseConfig, DroplessConfig
from moe.layers.attention import AttentionConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.models.sample import _generate, filter_logits, generate, init_cache
from moe.routing.activation_gate import ActivationGateConfig
from moe.routing.base import Context
from moe.routing.temperature import TemperatureConfig
from moe.routing.topk import TopKConfig

VOCAB, PROMPT, TOKENS = 61, 5, 9
CONFIG = DecoderConfig(
    vocab_size=VOCAB, width=16, num_layers=6, dense_layers=1, moe_every=2, mlp_hidden=24, tie_embeddings=False,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_width=8),
    moe=MoEConfig(num_experts=4, expert_hidden=8, shared_hidden=8, router=TopKConfig(num_selected=2)),
    init_std=0.3,  # far from the start of training, so that texts do not collapse to one token
)  # fmt: skip
DENSE_MODEL = dataclasses.replace(CONFIG, moe=None, moe_every=1, num_layers=2)
"""Compiles faster; for what does not depend on experts."""

HEADS = dataclasses.replace(CONFIG.attention, head_norm="qkv")
SPELLED = DecoderConfig(
    vocab_size=VOCAB, width=16, tie_embeddings=False, init_std=0.3, norm="sandwich",
    stacks=(
        StackConfig(layers=(HEADS, dataclasses.replace(CONFIG.moe, num_experts=2))),
        StackConfig(layers=(ParallelConfig(parts=(HEADS, CONFIG.moe)), MLPConfig(hidden=8)), repeats=2),
    ),
)  # fmt: skip
"""A pyramid of 2, 4 and 4 experts, whose upper layers have attention and experts side by side."""


def with_dispatch(dispatch):
    return dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, dispatch=dispatch))


@functools.cache
def make(config=CONFIG):
    """An abstract model, its parameters, a bias that moves the selection, and prompts of 3 rows."""
    params = jax.jit(lambda key: param.pure(config.build(key)))(jax.random.key(1))
    bias_LE = 0.2 * jax.random.normal(jax.random.key(2), (config.num_moe_layers, 4))
    prompt = np.random.default_rng(3).integers(0, VOCAB, (3, PROMPT)).astype(np.int32)
    return config.abstract(), params, bias_LE, prompt


def context_of(token_BS, start=0):
    token_BS = jnp.asarray(token_BS)
    B, S = token_BS.shape
    return Context(
        token_BS=token_BS, segment_BS=jnp.ones_like(token_BS), task_BS=jnp.zeros_like(token_BS),
        sequence_B=jnp.arange(B, dtype=jnp.int32),
        position_BS=jnp.broadcast_to(start + jnp.arange(S, dtype=jnp.int32), (B, S)),
        step=jnp.int32(0), key=jax.random.key(0),
    )  # fmt: skip


def text(model, params, bias_LE, prompt, **options):
    """`generate`, greedy unless told otherwise."""
    options = {"num_tokens": TOKENS, "temperature": 0.0, "top_p": 1.0, "eos": None, "key": jax.random.key(0)} | options
    return np.asarray(generate(model, params, bias_LE, prompt, **({"step": 0} | options)))


def recomputed(model, params, bias_LE, prompt):
    """Greedy text without a cache. Its length is fixed, as what follows a position cannot change it."""
    forward = jax.jit(lambda params, tokens: param.bind(model, params)(context_of(tokens), bias_LE)[0])
    tokens = np.zeros((len(prompt), PROMPT + TOKENS), np.int32)
    tokens[:, :PROMPT] = prompt
    for end in range(PROMPT, PROMPT + TOKENS):
        tokens[:, end] = np.asarray(forward(params, tokens))[:, end - 1].argmax(axis=-1)
    return tokens[:, PROMPT:]


@pytest.mark.parametrize(
    "config",
    [with_dispatch(DroplessConfig()), with_dispatch(DenseConfig()), DENSE_MODEL, SPELLED],
    ids=["dropless", "dense_dispatch", "dense_model", "stacks"],
)
def test_greedy_with_the_cache_is_greedy_by_recomputation(config):
    assert [stack.repeats for stack in CONFIG.layout] == [1, 2, 1]  # leading layer, periods, rest of a period
    model, params, bias_LE, prompt = make(config)
    expected = recomputed(model, params, bias_LE, prompt)
    np.testing.assert_array_equal(text(model, params, bias_LE, prompt), expected)
    assert len(np.unique(expected)) > 5


def test_decoding_in_pieces_gives_the_logits_of_the_whole():
    model, params, bias_LE, prompt = make()
    bound = param.bind(model, params)
    whole = jax.jit(lambda: bound(context_of(prompt), bias_LE)[0])()
    caches, start = init_cache(bound, 3, PROMPT + 2, jnp.float32), 0  # two positions stay empty
    for end in (2, 3, PROMPT):
        read = jax.jit(lambda start, piece, caches: bound.decode(context_of(piece, start), bias_LE, caches))
        logits, caches = read(start, prompt[:, start:end], caches)
        np.testing.assert_allclose(logits, whole[:, end - 1], atol=2e-5)
        start = end


def test_cache_has_the_layout_of_the_model():
    caches = init_cache(CONFIG.abstract(), 3, 7, jnp.bfloat16)
    attention = [cache for stack in caches for cache in stack[0::2]]  # feed-forwards remember nothing
    assert [cache.key_BSMH.shape[0] for cache in attention] == [1, 2, 2, 1]
    assert {cache.value_BSMH.shape[1:] for cache in attention} == {(3, 7, 2, 8)}
    assert {cache.value_BSMH.dtype for cache in attention} == {jnp.dtype("bfloat16")}
    assert [cache.length.tolist() for cache in attention] == [[0], [0, 0], [0, 0], [0]]
    assert {cache for stack in caches for cache in stack[1::2]} == {()}


def test_bfloat16_runs_and_stays_in_the_vocabulary():
    model, params, bias_LE, prompt = make(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    tokens = text(model, params, bias_LE, prompt)
    assert tokens.dtype == np.int32 and tokens.shape == (3, TOKENS)
    assert tokens.min() >= 0 and tokens.max() < VOCAB


def kept(logits, temperature, top_p):
    """Probabilities after the filter; tokens outside the nucleus have 0."""
    filtered = filter_logits(jnp.asarray([logits], jnp.float32), jnp.float32(temperature), jnp.float32(top_p))
    return np.asarray(jax.nn.softmax(filtered, axis=-1))[0]


def test_nucleus_of_logits_made_by_hand():
    logits = np.log([0.15, 0.5, 0.05, 0.3])
    np.testing.assert_allclose(kept(logits, 1.0, 1.0), [0.15, 0.5, 0.05, 0.3], rtol=1e-5)
    # 0.5 < 0.51 <= 0.5 + 0.3: two tokens, renormalised by 0.8
    np.testing.assert_allclose(kept(logits, 1.0, 0.51), [0, 0.625, 0, 0.375], rtol=1e-5)
    np.testing.assert_allclose(kept(logits, 1.0, 0.79), [0, 0.625, 0, 0.375], rtol=1e-5)
    # 0.8 < 0.81 <= 0.95: three, renormalised by 0.95
    np.testing.assert_allclose(kept(logits, 1.0, 0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], rtol=1e-5)
    np.testing.assert_allclose(kept(logits, 1.0, 0.49), [0, 1, 0, 0])


def test_temperature_acts_before_the_nucleus():
    # p^2 / sum: 0.0225, 0.25, 0.0025, 0.09 over 0.365: the first token alone has 0.685
    logits = np.log([0.15, 0.5, 0.05, 0.3])
    np.testing.assert_allclose(kept(logits, 0.5, 0.68), [0, 1, 0, 0])
    np.testing.assert_allclose(kept(logits, 0.5, 0.69), [0, 0.25 / 0.34, 0, 0.09 / 0.34], rtol=1e-5)


def test_nucleus_at_its_limits():
    # Equal tokens: the lower id is in first. Smallest top_p: one token. Float32 sums do not cut the tail at 1.
    np.testing.assert_allclose(kept([0.0, 0.0, 0.0, 0.0], 1.0, 0.4), [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(kept([0.0, 1.0, 1.0, 0.0], 1.0, 1e-30), [0, 1, 0, 0])
    assert (kept(-np.arange(70.0), 1.0, 1.0) > 0).all()
    np.testing.assert_allclose(kept([1e4, 0.0, 1e4], 1e-37, 0.9), [0.5, 0, 0.5])


def test_draws_follow_the_filtered_distribution():
    logits = np.log([0.15, 0.5, 0.05, 0.3])
    filtered = filter_logits(jnp.asarray(logits)[None], jnp.float32(1.0), jnp.float32(0.9))[0]
    draws = jax.random.categorical(jax.random.key(0), filtered, shape=(20_000,))
    share = np.bincount(draws, minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], atol=0.015)  # 4 standard deviations


def test_smallest_nucleus_and_smallest_temperature_are_greedy():
    parts = make(DENSE_MODEL)
    expected = text(*parts)
    np.testing.assert_array_equal(text(*parts, temperature=1.0, top_p=1e-6), expected)
    np.testing.assert_array_equal(text(*parts, temperature=1e-50), expected)
    assert (text(*parts, temperature=1.0) != expected).any()


def test_text_is_a_function_of_key_and_row():
    model, params, bias_LE, prompt = make(DENSE_MODEL)

    def draw(prompt, seed, num_tokens=TOKENS):
        return text(
            model, params, bias_LE, prompt, temperature=1.0, key=jax.random.key(seed), num_tokens=num_tokens
        )  # fmt: skip

    first = draw(prompt, 4)
    np.testing.assert_array_equal(draw(prompt, 4), first)
    assert (draw(prompt, 5) != first).any()
    np.testing.assert_array_equal(draw(prompt[:2], 4), first[:2])
    np.testing.assert_array_equal(draw(prompt, 4, num_tokens=4), first[:, :4])
    assert (draw(np.tile(prompt[:1], (2, 1)), 4)[0] != draw(np.tile(prompt[:1], (2, 1)), 4)[1]).any()


def test_every_row_and_position_draws_anew():
    # With all parameters 0 every token is equally probable everywhere, so equal noise would show as equal tokens.
    model, params, bias_LE, prompt = make(DENSE_MODEL)
    tokens = text(model, jax.tree.map(jnp.zeros_like, params), bias_LE, prompt, temperature=1.0)
    # 27 draws from 61 tokens: 22 different ones on average, with standard deviation 1.7.
    assert len(np.unique(tokens)) >= 15


def test_after_eos_a_row_is_eos():
    parts = make(DENSE_MODEL)
    free = text(*parts)
    # A token that one row produces in the middle and another row not at the same place.
    eos = int(free[0, 3])
    expected = free.copy()
    for row in expected:
        if eos in row:
            row[list(row).index(eos) :] = eos
    assert (expected != free).any()
    np.testing.assert_array_equal(text(*parts, eos=eos), expected)


def test_eos_as_first_token_of_all_rows():
    model, params, bias_LE, prompt = make(DENSE_MODEL)
    same = np.tile(prompt[:1], (2, 1))
    eos = int(text(model, params, bias_LE, same)[0, 0])
    np.testing.assert_array_equal(text(model, params, bias_LE, same, eos=eos), np.full((2, TOKENS), eos))


def test_one_token_and_one_program_for_every_temperature():
    model, params, bias_LE, prompt = make(DENSE_MODEL)
    expected = text(model, params, bias_LE, prompt)[:, :1]
    np.testing.assert_array_equal(text(model, params, bias_LE, prompt, num_tokens=1), expected)
    text(model, params, bias_LE, prompt, temperature=0.5, top_p=0.9)
    before = _generate._cache_size()
    text(DENSE_MODEL.abstract(), params, bias_LE, prompt, temperature=0.7, top_p=0.3, key=jax.random.key(9))
    assert _generate._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be at least 0"),
        ({"temperature": float("nan")}, "temperature = nan: must be at least 0"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0"),
        ({"top_p": 1.1}, "top_p = 1.1: must be above 0 and at most 1"),
        ({"num_tokens": 0}, "num_tokens = 0: must be at least 1"),
        ({"prompt": np.zeros((2, 0), np.int32)}, r"prompt has shape \(2, 0\): must be"),
        ({"prompt": np.zeros(3, np.int32)}, r"prompt has shape \(3,\): must be"),
        ({"prompt": np.full((1, 2), VOCAB)}, "prompt has token 61: must be in"),
        ({"prompt": np.array([[0, -1]])}, "prompt has token -1: must be in"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    model, params, bias_LE, prompt = make(DENSE_MODEL)
    with pytest.raises(ConfigError, match=message) as error:
        text(model, params, bias_LE, options.pop("prompt", prompt), **options)
    assert "\n" not in str(error.value)


def test_a_temperature_is_that_of_the_step_the_parameters_come_from():
    def at(step, start):
        router = ActivationGateConfig(init_std=2.0, temperature=TemperatureConfig(start=start, end=0.1, decay_steps=10))
        config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router=router))
        return text(*make(config), step=step, num_tokens=8)

    np.testing.assert_array_equal(at(10, 20.0), at(10, 0.2))  # both at 0.1 by then
    assert (at(0, 20.0) != at(10, 20.0)).any()
