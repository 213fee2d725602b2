"""What every router promises, as checks that take a config: of a router of the package, or of one written in a test.

A check raises AssertionError where the promise is broken. Declarations are promises too: a router that declares itself
not causal, not invariant to padding or deaf to the bias must really be so.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe import axes, param
from moe.axes import MeshConfig
from moe.balance.statistics import load, statistics
from moe.config import check as check_config
from moe.dispatch import CapacityConfig, DenseConfig, DroplessConfig, ExpertWeights
from moe.routing.base import Context, RouterConfig, Routing
from tests.routing.contexts import context_for
from tests.routing.measuring import (
    EXPERTS,
    B,
    D,
    S,
    built,
    by_token,
    close,
    differentiable,
    differs,
    expert_weights,
    experts,
    route,
    same,
    seen,
    tokens,
)

__all__ = ["CHECKS", "EXPERTS", "B", "Check", "D", "S", "expert_weights"]

PADDING, LATER = 3, 7
SMALLEST_GRADIENT = 1e-4

Check = Callable[[RouterConfig, int], None]


def shapes_ranges_and_dtypes(config: RouterConfig, E: int) -> None:
    """Static under jit (it is compiled once for all contents), in range, float32 whatever the compute dtype."""
    check_config(config)
    problems = list(config.layer_problems(E))
    assert not problems, f"not for {E} experts: {problems}"
    for x in (tokens(), tokens().astype(jnp.bfloat16)):
        routing = route(config, E, x, context_for(B, S, padding=PADDING))
        R = routing.token_BR.shape[1]
        places = S if routing.slots is None else routing.slots.gather_BPS.shape[1]
        assert routing.token_BR.shape == routing.expert_BR.shape == routing.weight_BR.shape == (B, R)
        assert routing.token_BR.dtype == routing.expert_BR.dtype == jnp.int32
        assert routing.probs_BSE.shape == (B, S, E) and routing.log_z_BS.shape == routing.margin_BS.shape == (B, S)
        assert ((routing.token_BR >= 0) & (routing.token_BR < places)).all(), "a token out of range"
        assert ((routing.expert_BR >= 0) & (routing.expert_BR <= E)).all(), "an expert out of range"
        for name, value in _floats(routing).items():
            assert value.dtype == jnp.float32, f"{name} is {value.dtype}"
            assert name == "margin_BS" or np.isfinite(value).all(), f"{name} is not finite"
        assert (routing.margin_BS >= 0).all(), "a negative or undefined margin"
        if (K := routing.num_selected) is not None:
            assert places * K == R, "num_selected says how many assignments there are"
            np.testing.assert_array_equal(routing.token_BR, np.tile(np.repeat(np.arange(places), K), (B, 1)))
            chosen = np.sort(routing.expert_BR.reshape(B, places, K), axis=-1)
            assert ((np.diff(chosen, axis=-1) > 0) | (chosen[..., 1:] == E)).all(), "an expert is chosen twice"
            if routing.slots is None:
                assert config.experts_per_token(E) == K, "experts_per_token is not what is assigned"


def _floats(routing: Routing) -> dict[str, np.ndarray]:
    found = {name: getattr(routing, name) for name in ("weight_BR", "probs_BSE", "log_z_BS", "margin_BS")}
    if routing.priority_BR is not None:
        found["priority_BR"] = routing.priority_BR
    if routing.slots is not None:
        found |= {"gather_BPS": routing.slots.gather_BPS, "scatter_BSP": routing.slots.scatter_BSP}
    return found


def padding_is_void_and_the_load_sums_to_one(config: RouterConfig, E: int) -> None:
    context = context_for(B, S, padding=PADDING)
    routing = route(config, E, tokens(), context)
    real = np.asarray(context.mask_BS)
    if routing.slots is None:
        void = ~np.take_along_axis(real, routing.token_BR, axis=1)
        assert (routing.expert_BR[void] == E).all(), "a padding token reaches an expert"
    else:
        assert not routing.slots.gather_BPS[:, :, ~real[0]].any(), "a slot reads a padding token"
        assert not routing.slots.scatter_BSP[:, ~real[0]].any(), "a padding token receives from a slot"
    assert not routing.weight_BR[routing.expert_BR == E].any(), "a void assignment has a weight"
    np.testing.assert_allclose(routing.probs_BSE.sum(axis=-1), real, atol=1e-6)
    assert not routing.log_z_BS[~real].any() and np.isinf(routing.margin_BS[~real]).all()
    sums = statistics(routing, context.mask_BS, jnp.zeros((B,), jnp.int32))
    np.testing.assert_allclose(load(sums.count_BE).sum(axis=-1), 1.0, rtol=1e-6)
    assert int(sums.count_BE.sum()) == int((routing.expert_BR < E).sum())
    np.testing.assert_array_equal(sums.tokens_B, real.sum(axis=1))
    served = np.full(real.shape, routing.slots is not None)
    for b, r in np.ndindex(routing.expert_BR.shape) if routing.slots is None else ():
        served[b, routing.token_BR[b, r]] |= routing.expert_BR[b, r] < E
    np.testing.assert_array_equal(sums.unserved_B, (real & ~served).sum(axis=1), "tokens without an expert")


def the_content_of_padding_changes_nothing(config: RouterConfig, E: int) -> None:
    context = context_for(B, S, padding=PADDING)
    other, x = _changed(context, tokens(), S - PADDING)
    a, b = route(config, E, tokens(), context), route(config, E, x, other)
    np.testing.assert_array_equal(a.expert_BR, b.expert_BR)
    real = np.s_[:, : S - PADDING]
    same(seen(a, E, tokens()), seen(b, E, x), "the content of padding", real)


def _changed(context: Context, x: jax.Array, start: int) -> tuple[Context, jax.Array]:
    """Other vectors, token ids and tasks from position `start` on; the documents stay."""
    later = jnp.arange(x.shape[1]) >= start
    token_BS = jnp.where(later, context.token_BS * 3 + 1, context.token_BS)
    task_BS = jnp.where(later, 1 - context.task_BS, context.task_BS)
    x = jnp.where(later[:, None], 3 * tokens(9, x.shape[1]), x)
    return dataclasses.replace(context, token_BS=token_BS, task_BS=task_BS), x


def appended_padding_changes_nothing_unless_declared(config: RouterConfig, E: int) -> None:
    a = route(config, E, tokens(), context_for(B, S))
    longer = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, S))) if leaf.ndim == 2 else leaf, context_for(B, S))
    x = jnp.concatenate([tokens(), tokens(2)], axis=1)
    b = route(config, E, x, longer)
    first, second, here = seen(a, E, tokens()), seen(b, E, x), np.s_[:, :S]
    if config.padding_invariant:
        same({k: v[here] for k, v in second.items()}, first, "appended padding")
    else:
        assert differs({k: v[here] for k, v in second.items()}, first), "invariant to padding, but declares it is not"


def later_tokens_change_nothing_unless_declared(config: RouterConfig, E: int) -> None:
    context, before, after = context_for(B, S), np.s_[:, :LATER], np.s_[:, LATER:]
    plain = seen(route(config, E, tokens(), context), E, tokens())
    other, x = _changed(context, tokens(), LATER)
    changed = seen(route(config, E, x, other), E, x)
    gone = dataclasses.replace(context, segment_BS=jnp.where(jnp.arange(S) < LATER, context.segment_BS, 0))
    missing = seen(route(config, E, tokens(), gone), E, tokens())
    assert differs(plain, changed, after), "the probe changes nothing at all"
    if config.causal:
        same(plain, changed, "other later tokens", before)
        same(plain, missing, "no later tokens", before)
    else:
        assert differs(plain, changed, before), "causal, but declares it is not"


@functools.cache
def _pull(config: RouterConfig, E: int) -> Any:
    """params, x, context, cotangent of differentiable(routing) -> gradient in params."""
    router = built(config, E)

    def gradient(params: Any, x: jax.Array, context: Context, cotangent: Any) -> Any:
        run = lambda p: differentiable(param.bind(router, p)(x, context, jnp.zeros(E)))  # noqa: E731
        return jax.vjp(run, params)[1](cotangent)[0]

    return jax.jit(gradient)


def the_task_teaches_the_router_and_dispatchers_agree(config: RouterConfig, E: int) -> None:
    """Value, and gradient in tokens, combine weights (or slots), expert weights and every parameter of the router."""
    x, context, weights = tokens(), context_for(B, S, padding=PADDING), expert_weights(E)
    routing, params = route(config, E, x, context), param.pure(built(config, E))
    (value, (y, _)), gradient = experts(DenseConfig(), x, routing, weights)
    taught = jax.device_get(_pull(config, E)(params, x, context, gradient[1]))
    if config.task_gradient:
        assert jax.tree.leaves(params), "has no parameter that the task could teach"
        for path, leaf in jax.tree_util.tree_leaves_with_path(taught):
            size = np.abs(leaf).max()
            assert size > SMALLEST_GRADIENT, f"no task gradient to {jax.tree_util.keystr(path)}: {size:.2g} at most"
    else:
        told = inspect.getdoc(inspect.getmodule(type(config))) or ""
        assert "task gradient" in told.lower(), "the module's docstring does not say why there is no task gradient"
    for other in (DroplessConfig(), CapacityConfig(capacity_factor=float(E * S))):
        name = type(other).__name__
        (found_value, (found_y, dropped)), found = experts(other, x, routing, weights)
        assert not dropped.any()
        close((found_value, found_y), (value, y), f"{name} value")
        close(found, gradient, f"{name} gradient")
        close(_pull(config, E)(params, x, context, found[1]), taught, f"{name} gradient of the router")


def renaming_experts_renames_everything(config: RouterConfig, E: int) -> None:
    """In evaluation: noise is drawn per expert, so a renaming would have to rename it too."""
    bias_E = jnp.linspace(-0.1, 0.1, E)
    context = context_for(B, S, padding=PADDING, train=False)
    if (found := built(config, E).symmetry(jax.random.key(7), E)) is None:
        return
    order, renamed = np.asarray(found[0]), found[1]
    assert sorted(order) == list(range(E)) and (order != np.arange(E)).any(), "not a permutation, or one that is idle"
    a = route(config, E, tokens(), context, bias_E)
    b = jax.device_get(jax.jit(lambda x, context, bias: renamed(x, context, bias))(tokens(), context, bias_E[order]))
    first, second = seen(a, E, tokens()), seen(b, E, tokens())
    first |= {name: first[name][..., order] for name in ("weights", "probs_BSE")}
    weights = ExpertWeights(*(w[order] for w in expert_weights(E)))
    second["y"] = experts(DenseConfig(), tokens(), b, weights)[0][1][0]
    same(second, first, "renamed experts")


def any_number_of_devices_routes_the_same(config: RouterConfig, E: int) -> None:
    """In training, so noise is met too; with sequences cut, and with their positions cut as the residual stream's."""
    router, context = built(config, E), context_for(B, S, padding=PADDING)
    expected = route(config, E, tokens(), context)
    for sizes in ({"data": 1}, {"data": 2, "context": 2, "tensor": 2}, {"data": 8}):
        mesh = axes.make_mesh(MeshConfig(**sizes), jax.devices()[: MeshConfig(**sizes).num_devices])
        with jax.set_mesh(mesh):
            cut = axes.sharding(mesh, ("batch",))
            place = lambda leaf: jax.device_put(leaf, cut) if leaf.ndim and leaf.shape[0] == B else leaf  # noqa: E731,B023
            x_BSD = jax.device_put(tokens(), axes.sharding(mesh, ("batch", "stream", None)))
            run = jax.jit(lambda x, context: router(x, context, jnp.zeros(E)))
            found = jax.device_get(run(x_BSD, jax.tree.map(place, context)))
        _equal(found, expected, f"a mesh of {sizes}")


def _equal(found: Routing, expected: Routing, what: str) -> None:
    np.testing.assert_array_equal(found.token_BR, expected.token_BR, what)
    np.testing.assert_array_equal(found.expert_BR, expected.expert_BR, what)
    values = _floats(expected)
    for name, value in _floats(found).items():
        np.testing.assert_allclose(value, values[name], 1e-6, 1e-6, err_msg=f"{what}: {name}")


def a_batch_in_two_halves_routes_the_same(config: RouterConfig, E: int) -> None:
    """In training: noise follows the sequence, not its place in the micro-batch."""
    whole = route(config, E, tokens(), context_for(B, S, padding=PADDING))
    for start in (0, B // 2):
        rows = slice(start, start + B // 2)
        half = route(config, E, tokens()[rows], context_for(B // 2, S, padding=PADDING, first=start))
        _equal(half, jax.tree.map(lambda leaf: leaf[rows], whole), f"sequences from {start}")  # noqa: B023


def a_bias_moves_the_selection_and_not_the_weights(config: RouterConfig, E: int) -> None:
    context = context_for(B, S)
    plain = route(config, E, tokens(), context)
    before, counts = by_token(plain, E), np.bincount(plain.expert_BR.ravel(), minlength=E)
    unliked = int(counts[:E].argmin())
    pushed = route(config, E, tokens(), context, 100.0 * (np.arange(E) == unliked))
    for name in ("probs_BSE", "log_z_BS"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(pushed, name), f"a bias changes {name}")
    if not config.uses_bias:
        _equal(pushed, plain, "moved by the bias, but declares that it ignores it")
        return
    shifted = route(config, E, tokens(), context, np.full(E, 0.5))
    _equal(shifted, plain, "moved by a bias that is the same for all experts")
    full = B * S
    after = np.bincount(pushed.expert_BR.ravel(), minlength=E)
    assert counts[unliked] == full or after[unliked] > counts[unliked], "a bias does not move the selection"
    # What the first token chose, pushed up by unequal amounts: the same experts are chosen, with the same weights.
    chosen = before[0, 0] > 0
    order = np.where(chosen, 100.0 + 10.0 * np.arange(E), 0.0)
    found = by_token(route(config, E, tokens(), context, order), E)[0, 0]
    np.testing.assert_allclose(found, before[0, 0], rtol=1e-6, err_msg="a bias changes the combine weights")


CHECKS: tuple[Check, ...] = (
    shapes_ranges_and_dtypes,
    padding_is_void_and_the_load_sums_to_one,
    the_content_of_padding_changes_nothing,
    appended_padding_changes_nothing_unless_declared,
    later_tokens_change_nothing_unless_declared,
    the_task_teaches_the_router_and_dispatchers_agree,
    renaming_experts_renames_everything,
    any_number_of_devices_routes_the_same,
    a_batch_in_two_halves_routes_the_same,
    a_bias_moves_the_selection_and_not_the_weights,
)
