"""The layers of a stack as one `jax.lax.scan` over its repeats, in training and with caches.

No two sublayers of a model share a random key, for parameters or for noise: they draw from the key of their place in
the model, counted sublayer by sublayer, so how the layers are grouped into stacks changes no number.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe import param
from moe.balance.statistics import Statistics, stack_layers
from moe.layers.base import SublayerConfig
from moe.models.layout import Stacks, first_block, in_order
from moe.models.remat import recomputed
from moe.models.residual import Form, Norm, Residual, form_of
from moe.routing.base import Context


class Given(NamedTuple):
    """What every repeat of a stack is given beside its parameters."""

    first_R: jax.Array
    """int32 number, in the model, of the repeat's first sublayer."""
    bias: tuple[jax.Array, ...]
    """For every sublayer of the pattern the expert bias [R, E] with its own E; [R, 0] where nothing is routed."""


def build(
    layout: Stacks, norm: Norm, key: jax.Array, *, width: int, init_std: float, norm_eps: float = 1e-6,
    pieces: Sequence[int | None] = (),
) -> Iterator[nnx.List]:  # fmt: skip
    """For every stack its pattern of sublayers, each with the parameters of all repeats; `pieces` as in `param.stack`
    for the first stacks, None for the rest."""
    total, first, start = sum(1 for _ in in_order(layout)), first_block(layout), 0
    keys = jax.random.split(key, total)
    for stack, cut in itertools.zip_longest(layout, pieces):
        end, pattern = start + len(stack.layers) * stack.repeats, []
        for place, config in enumerate(stack.layers, start):
            form = form_of(norm, config, place < first)

            def make(key: jax.Array, config: SublayerConfig = config, form: Form = form) -> Residual:
                return Residual(config, form, key, width=width, depth=total / 2, init_std=init_std, norm_eps=norm_eps)

            pattern.append(param.stack(make, keys[place : end : len(stack.layers)], cut))
        yield nnx.List(pattern)
        start = end


def given(layout: Stacks, bias_LE: jax.Array) -> Iterator[Given]:
    """For every stack, from the expert bias of the whole model in layer order, as wide as the widest layer."""
    first = row = 0
    for stack in layout:
        R, widths = stack.repeats, [config.routed_experts for config in stack.layers]
        routed = sum(E > 0 for E in widths)
        rows = iter(bias_LE[row : row + R * routed].reshape(R, routed, bias_LE.shape[-1]).swapaxes(0, 1))
        bias = tuple(next(rows)[:, :E] if E else jnp.zeros((R, 0)) for E in widths)
        yield Given(first + len(widths) * jnp.arange(R), bias)
        first, row = first + R * len(widths), row + R * routed


def run(
    pattern: nnx.List, x_BSD: jax.Array, context: Context, given: Given, remat: str
) -> tuple[jax.Array, tuple[Statistics, ...]]:
    """One stack: (x_BSD, statistics [R, B, ...] of every routed sublayer of its pattern)."""
    graph, state = _split(pattern)
    return repeat(graph, state, x_BSD, context, given, remat)


def repeat(
    graph: Any, state: Any, x_BSD: jax.Array, context: Context, given: Given, remat: str, stages: int | None = None
) -> tuple[jax.Array, tuple[Statistics, ...]]:
    """`run` for some consecutive repeats of a stack, whose pattern is split into `graph` and their parameters.

    `stages`: as many such runs go side by side.
    """

    def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, tuple[Statistics, ...]]:
        params, here = scanned
        found = []
        for place, residual in enumerate(nnx.merge(graph, params)):
            x, sums = residual(x, _own(context, here, place), here.bias[place])
            found += [sums] if sums is not None else []
        return x, tuple(found)

    return jax.lax.scan(recomputed(body, remat, stages), x_BSD, (state, given))


def run_cached(
    pattern: nnx.List, x_BSD: jax.Array, context: Context, given: Given, caches: tuple[Any, ...]
) -> tuple[jax.Array, tuple[Any, ...]]:
    """`run` with a cache for every sublayer of the pattern, stacked over the repeats like its parameters."""
    graph, state = _split(pattern)

    def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        params, here, before = scanned
        after = []
        for place, residual in enumerate(nnx.merge(graph, params)):
            x, cache = residual.decode(x, _own(context, here, place), here.bias[place], before[place])
            after.append(cache)
        return x, tuple(after)

    return jax.lax.scan(body, x_BSD, (state, given, caches))


def in_layer_order(found: Sequence[tuple[Statistics, ...]], layout: Stacks) -> Statistics | None:
    """Statistics [L, B, ...] of the model from those of its stacks: repeat by repeat, within one place by place."""
    widths = [[config.routed_experts for config in stack.layers if config.routed_experts] for stack in layout]
    parts = [pair for sums, E in zip(found, widths, strict=True) for pair in zip(sums, E, strict=True)]
    if not parts:
        return None
    joined = stack_layers(parts)
    order: list[int] = []
    for stack, routed in zip(layout, widths, strict=True):
        first, R, places = len(order), stack.repeats, range(len(routed))
        order += [first + place * R + repeat for repeat in range(R) for place in places]
    if order == sorted(order):
        return joined
    rows = np.array(order)
    in_order_of = tuple(joined.widths[row] for row in order) if joined.widths else ()
    return dataclasses.replace(jax.tree.map(lambda leaf: leaf[rows], joined), widths=in_order_of)


def _own(context: Context, given: Given, place: int) -> Context:
    return dataclasses.replace(context, key=jax.random.fold_in(context.key, given.first_R + place))


def _split(pattern: nnx.List) -> tuple[Any, Any]:
    return nnx.split(pattern)
