"""Text generation with a key-value cache: the prompt is read once, then every token costs one position.

    p = softmax(logits / temperature),  restricted to the nucleus of p and renormalised;   temperature 0: argmax

The nucleus for `top_p` is the smallest set of most probable tokens whose probabilities add up to at least `top_p`; of
equally probable tokens those with the lower id come first. Everything is float32.

The key of a draw folds (row, position), so a row's text depends neither on the number of rows nor on num_tokens.
Dispatch sees a group of one position at a time: a dispatcher that drops can drop inside the prompt and nowhere else.
Compiled once per model, prompt shape, num_tokens and eos. Collectives: none without a mesh.
Source: Holtzman et al. 2019 (arXiv 1904.09751), section 3.1. Differs from the paper: no difference known.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe import param
from moe.config import ConfigError
from moe.models.decoder import Caches, Decoder
from moe.routing.base import Context


def init_cache(model: Decoder, batch: int, length: int, dtype: Any) -> Caches:
    """Empty caches for `length` positions of `batch` sequences; `model` may be abstract.

    For every stack of the model, for every sublayer of its pattern, what its `empty_cache` gives, with the stack's R
    repeats as a leading dimension: of attention keys and values [R, batch, length, M, H] in `dtype` and filled
    positions int32 [R]. A `lax.scan` over the repeats slices them.
    """
    stacks = tuple(
        tuple(
            jax.tree.map(
                lambda leaf, repeats=stack.repeats: jnp.broadcast_to(leaf, (repeats, *leaf.shape)),
                residual.sublayer.empty_cache(batch, length, dtype),
            )
            for residual in pattern
        )
        for stack, pattern in zip(model.config.trunk, model.stacks, strict=False)
    )
    return stacks if model.config.decider is None else (*stacks, model.router.empty_cache(batch, length))


def check_sampling(*, num_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ConfigError for the first value that cannot work."""
    if num_tokens < 1:
        raise ConfigError(f"num_tokens = {num_tokens}: must be at least 1")
    if not 0 <= temperature < np.inf:
        raise ConfigError(
            f"temperature = {temperature}: must be at least 0 and finite; 0 takes the most probable token"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p}: must be above 0 and at most 1; 1 keeps every token")


def generate(
    model: Decoder,
    params: Any,
    bias_LE: jax.Array,
    prompt: Any,
    *,
    num_tokens: int,
    temperature: float,
    top_p: float,
    key: jax.Array,
    eos: int | None,
    step: int,
) -> jax.Array:
    """int32 [B, num_tokens] that continue `prompt` int32 [B, P]; all rows are equally long, there is no padding.

    `model` may be abstract; `params` is the tree of `moe.param.pure`, `bias_LE` float32 the experts' selection bias;
    `step` is the optimizer step that both come from, as a router's temperature may follow it.
    Once a row has produced `eos` the rest of it is `eos`, and work ends when every row has; None: never.
    Keys and values are cached in the compute dtype. Raises ConfigError for a value of `check_sampling`, for an empty
    prompt, for a token id outside the vocabulary, and for a model with a router that looks at later tokens.
    """
    check_sampling(num_tokens=num_tokens, temperature=temperature, top_p=top_p)
    for path in model.config.non_causal:
        raise ConfigError(f"model.{path}: looks at later tokens, which do not exist yet when a text is written")
    prompt_BP = _checked_prompt(prompt, model.config.vocab_size)
    graph, state = nnx.split(param.bind(model, params))
    # A temperature that is no normal float32 would divide 0 by 0; its distribution is the greedy one.
    greedy = temperature < np.finfo(np.float32).tiny
    return _generate(
        graph, state, bias_LE, prompt_BP, key, jnp.float32(temperature), jnp.float32(top_p), jnp.int32(step),
        num_tokens=num_tokens, greedy=greedy, eos=eos,
    )  # fmt: skip


def filter_logits(logits_BV: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """float32 [B, V]: log p + constant of a row's nucleus, -inf outside it; `temperature` > 0, `top_p` in (0, 1]."""
    logits_BV = logits_BV.astype(jnp.float32)
    # The maximum is subtracted first, so that a small temperature overflows to probability 0 and not to nan.
    scaled_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    order_BV = jnp.argsort(scaled_BV, axis=-1, descending=True, stable=True)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(scaled_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.pad(jnp.cumsum(probs_BV, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    # Rounding must neither cut the tail at top_p = 1 nor empty the nucleus at the smallest top_p.
    kept_BV = (before_BV < top_p) | (top_p >= 1) | (jnp.arange(probs_BV.shape[1]) == 0)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_BV, rank_BV, axis=-1), scaled_BV, -jnp.inf)


def _checked_prompt(prompt: Any, vocab_size: int) -> jax.Array:
    tokens = np.asarray(prompt)
    if tokens.ndim != 2 or tokens.size == 0:
        raise ConfigError(f"prompt has shape {tokens.shape}: must be [B, P] with at least one row and one token")
    # The embedding would answer an id it does not have with nan.
    if (low := tokens.min()) < 0 or (high := tokens.max()) >= vocab_size:
        raise ConfigError(f"prompt has token {low if low < 0 else high}: must be in [0, vocab_size = {vocab_size})")
    return jnp.asarray(tokens, jnp.int32)


@partial(jax.jit, static_argnames=("graph", "num_tokens", "greedy", "eos"))
def _generate(
    graph: Any, state: Any, bias_LE: jax.Array, prompt_BP: jax.Array, key: jax.Array, temperature: jax.Array,
    top_p: jax.Array, step: jax.Array, *, num_tokens: int, greedy: bool, eos: int | None,
) -> jax.Array:  # fmt: skip
    model = nnx.merge(graph, state)
    B, P = prompt_BP.shape
    row_B = jnp.arange(B, dtype=jnp.int32)
    routing_key, sampling_key = jax.random.split(key)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(sampling_key, row_B)

    def read(token_BS: jax.Array, start: jax.Array | int, caches: Caches) -> tuple[jax.Array, Caches]:
        position_S = start + jnp.arange(token_BS.shape[1], dtype=jnp.int32)
        context = Context(
            token_BS=token_BS,
            segment_BS=jnp.ones_like(token_BS),
            position_BS=jnp.broadcast_to(position_S, token_BS.shape),
            task_BS=jnp.zeros_like(token_BS),
            sequence_B=row_B,
            step=step,
            key=routing_key,
        )
        return model.decode(context, bias_LE, caches)

    def pick(logits_BV: jax.Array, position: jax.Array | int) -> jax.Array:
        if greedy:
            return logits_BV.argmax(axis=-1).astype(jnp.int32)
        draw = jax.vmap(lambda key, logits_V: jax.random.categorical(jax.random.fold_in(key, position), logits_V))
        return draw(keys_B, filter_logits(logits_BV, temperature, top_p)).astype(jnp.int32)

    def emit(logits_BV: jax.Array, index: jax.Array | int, done_B: jax.Array, out_BT: jax.Array) -> Any:
        token_B = pick(logits_BV, P + index)
        if eos is not None:
            token_B = jnp.where(done_B, eos, token_B)
            done_B = token_B == eos
        return token_B, done_B, out_BT.at[:, index].set(token_B)

    def unfinished(carry: Any) -> jax.Array:
        index, (_, done_B, _), _ = carry
        return (index < num_tokens) & ~done_B.all()

    def one_more(carry: Any) -> Any:
        index, (token_B, done_B, out_BT), caches = carry
        logits_BV, caches = read(token_B[:, None], P + index - 1, caches)
        return index + 1, emit(logits_BV, index, done_B, out_BT), caches

    # The last token is produced and never read, so the caches need not hold it.
    empty = init_cache(model, B, P + num_tokens - 1, jnp.dtype(model.config.compute_dtype))
    with jax.named_scope("prefill"):
        logits_BV, caches = read(prompt_BP, 0, empty)
    out_BT = jnp.full((B, num_tokens), 0 if eos is None else eos, jnp.int32)
    start = (jnp.int32(1), emit(logits_BV, 0, jnp.zeros((B,), bool), out_BT), caches)
    with jax.named_scope("decode"):
        return jax.lax.while_loop(unfinished, one_more, start)[1][2]
