"""The load-balance loss against loops, its closed-form gradient, and the identities that define its scopes.

Guards against: Megatron #7197 (running counts divided by the current micro-batch's tokens), Megatron #3672 (scale of
the global loss), MaxText #1432 (combine weights in place of probabilities), HF #45120 (softmax of softmax), HF
pooling layers (transformers #31464), coefficient conventions that differ by K (OLMoE #45).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import Batch, LoadBalanceConfig, Statistics, ZLossConfig, load, summary
from moe.config import ConfigError, check
from tests import grid, oracle
from tests.balance.made import made
from tests.grid import EXPERTS, RULES, Cut

RNG = np.random.default_rng(0)


def routed(logits_GSE: np.ndarray, mask_GS: np.ndarray, K: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, chosen experts) of token-choice routing, in numpy."""
    z = np.exp(logits_GSE - logits_GSE.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True) * mask_GS[..., None], np.argsort(-logits_GSE, axis=-1)[..., :K]


def sums(logits_GSE: Any, mask_GS: np.ndarray, expert_GSK: np.ndarray) -> Statistics:
    """Statistics of one layer [1, G, ...], with the gradient in the logits."""
    E = logits_GSE.shape[-1]
    hit = (expert_GSK[..., None] == np.arange(E)).sum(axis=2) * mask_GS[..., None]
    prob = jax.nn.softmax(logits_GSE, axis=-1) * mask_GS[..., None]
    z = jnp.square(jax.nn.logsumexp(logits_GSE, axis=-1)) * mask_GS
    return made(
        hit.sum(axis=1)[None], prob_BE=prob.sum(axis=1)[None], z_B=z.sum(axis=1)[None],
        tokens_B=jnp.asarray(mask_GS.sum(axis=1), jnp.int32)[None],
    )  # fmt: skip


def term(rule: LoadBalanceConfig | ZLossConfig, stats: Statistics, state: Any = None) -> jax.Array:
    """Value of a batch that is one micro-batch."""
    L, _, E = stats.count_BE.shape
    batch = Batch(jnp.int32(0), 1, stats.tokens_B[0].sum().astype(jnp.float32), None)
    state = rule.init_state(np.ones((L, E), bool)) if state is None else state
    return rule.term(stats, batch, rule.init_carry(np.ones((L, E), bool)), state)[0][0]


def example(G: int = 8, S: int = 6, E: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits [G, S, E] skewed by sequence and an uneven mask."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (G, S, E)) + 2 * rng.normal(0, 1, (G, 1, E))
    mask = np.arange(S) < rng.integers(0, S + 1, (G, 1))
    mask[0], mask[3] = True, False
    return logits.astype(np.float32), mask


@pytest.mark.parametrize("scope", ["sequence", 2, 4, "global"])
def test_the_loss_equals_a_loop_over_groups_and_tokens(scope: Any) -> None:
    logits, mask = example()
    probs, experts = routed(logits, mask)
    found = term(LoadBalanceConfig(scope=scope), sums(logits, mask, experts))
    np.testing.assert_allclose(found, oracle.load_balance(probs, experts, mask, scope), rtol=2e-6)


@pytest.mark.parametrize("scope", ["sequence", 2, "global"])
def test_the_unweighted_mean_of_groups_is_another_number(scope: Any) -> None:
    """The loop above can tell token weights from equal weights."""
    logits, mask = example()
    probs, experts = routed(logits, mask)
    n = {"sequence": 1, "global": 8}.get(scope, scope)
    groups = [slice(g, g + n) for g in range(0, 8, n) if mask[g : g + n].any()]
    unweighted = np.mean([oracle.load_balance(probs[g], experts[g], mask[g], "global") for g in groups])
    weighted = oracle.load_balance(probs, experts, mask, scope)
    assert (abs(unweighted - weighted) > 1e-3) == (scope != "global")


@pytest.mark.parametrize("scope", ["sequence", 4, "global"])
@pytest.mark.parametrize(("E", "K"), [(4, 1), (4, 2), (8, 3)])
def test_perfect_balance_is_exactly_one_for_any_K_and_E(scope: Any, E: int, K: int) -> None:
    experts = (np.arange(E)[None, :, None] + np.arange(K)) % E * np.ones((4, 1, 1), int)
    mask = np.ones((4, E), bool)
    assert float(term(LoadBalanceConfig(scope=scope), sums(jnp.zeros((4, E, E)), mask, experts))) == 1.0


def test_collapse_to_one_expert_costs_the_number_of_experts() -> None:
    logits = np.zeros((2, 3, 4), np.float32)
    logits[..., 1] = 60.0
    experts = np.full((2, 3, 1), 1)
    np.testing.assert_allclose(term(LoadBalanceConfig(), sums(logits, np.ones((2, 3), bool), experts)), 4.0, rtol=1e-6)


@pytest.mark.parametrize("scope", ["sequence", 2, 4, "global"])
def test_the_logit_gradient_has_the_closed_form(scope: Any) -> None:
    """d loss / d z_tm = (E / n) p_tm (f_m - sum_i f_i p_ti), f of the token's group."""
    logits, mask = example()
    probs, experts = routed(logits, mask)
    rule = LoadBalanceConfig(scope=scope)
    found = jax.grad(lambda z: term(rule, sums(z, mask, experts)))(jnp.asarray(logits))
    G, S, E = logits.shape
    n = {"sequence": 1, "global": G}.get(scope, scope)
    expected = np.zeros((G, S, E))
    for g in range(G):
        first = g // n * n
        chosen = experts[first : first + n][mask[first : first + n]].reshape(-1)
        for s in range(S):
            if mask[g, s]:
                f, p = np.bincount(chosen, minlength=E) / chosen.size, probs[g, s]
                expected[g, s] = E / mask.sum() * p * (f - f @ p)
    np.testing.assert_allclose(found, expected, atol=2e-7)
    assert np.abs(expected).max() > 1e-3


def covariance(a_GE: np.ndarray, b_GE: np.ndarray, weight_G: np.ndarray) -> np.ndarray:
    weight = weight_G[:, None] / weight_G.sum()
    return (weight * a_GE * b_GE).sum(0) - (weight * a_GE).sum(0) * (weight * b_GE).sum(0)


@pytest.mark.parametrize("uneven", [False, True], ids=["equal groups", "token-weighted"])
def test_micro_minus_global_is_E_times_the_covariance_of_f_and_P(uneven: bool) -> None:
    logits, mask = example()
    mask = mask if uneven else np.ones_like(mask)
    probs, experts = routed(logits, mask)
    stats = sums(logits, mask, experts)
    gap = float(term(LoadBalanceConfig(scope="sequence"), stats) - term(LoadBalanceConfig(), stats))
    n_G = mask.sum(axis=1)
    f_GE = np.asarray(load(stats.count_BE[0]))
    P_GE = probs.sum(axis=1) / np.maximum(n_G, 1)[:, None]
    expected = logits.shape[-1] * covariance(f_GE, P_GE, n_G).sum()
    np.testing.assert_allclose(gap, expected, rtol=1e-5)
    assert gap > 0.1


def test_scopes_coincide_for_one_group_and_for_identical_groups() -> None:
    logits, mask = example()
    _, experts = routed(logits, mask)
    one = sums(logits[:1], mask[:1], experts[:1])
    assert float(term(LoadBalanceConfig(scope="sequence"), one)) == float(term(LoadBalanceConfig(), one))
    same = sums(np.tile(logits[:1], (4, 1, 1)), np.tile(mask[:1], (4, 1)), np.tile(experts[:1], (4, 1, 1)))
    values = [float(term(LoadBalanceConfig(scope=scope), same)) for scope in ("sequence", 2, "global")]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def specialised(E: int = 4, S: int = 6, height: float = 3.0) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Sequence g speaks to expert g alone, at finite logits; over the batch every expert has the same load."""
    logits = np.zeros((E, S, E), np.float32)
    logits[np.arange(E), :, np.arange(E)] = height
    return jnp.asarray(logits), np.ones((E, S), bool), np.tile(np.arange(E)[:, None, None], (1, S, 1))


def test_a_specialised_and_globally_balanced_router_is_left_alone_by_the_global_scope_only() -> None:
    """f = 1/E makes f_m - sum_i f_i p_ti vanish whatever p is; within a sequence f is one-hot and p is not."""
    logits, mask, experts = specialised()
    gradient = {
        scope: np.asarray(jax.grad(lambda z, s=scope: term(LoadBalanceConfig(scope=s), sums(z, mask, experts)))(logits))
        for scope in ("global", "sequence", 2)
    }
    assert np.abs(gradient["global"]).max() < 1e-7  # rounding
    assert np.abs(gradient["sequence"]).max() > 1e-3
    assert np.abs(gradient[2]).max() > 1e-4
    # Descent on the per-sequence loss takes probability away from the expert the sequence is about.
    assert all(gradient["sequence"][g, :, g].min() > 0 for g in range(4))


def test_the_load_carries_no_gradient_and_padding_none_either() -> None:
    logits, mask = example()
    _, experts = routed(logits, mask)
    gradient = jax.grad(lambda z: term(LoadBalanceConfig(), sums(z, mask, experts)))(jnp.asarray(logits))
    assert not np.asarray(gradient)[~mask].any()
    assert (np.abs(np.asarray(gradient)).max(axis=-1) > 0)[mask].all()


def test_the_z_loss_is_the_mean_square_of_logsumexp() -> None:
    logits, mask = example()
    _, experts = routed(logits, mask)
    expected = np.mean([np.log(np.exp(z.astype(np.float64)).sum()) ** 2 for z in logits[mask]])
    np.testing.assert_allclose(term(ZLossConfig(), sums(logits, mask, experts)), expected, rtol=1e-6)


# The terms of a real step, against the loops over the routing of an unrolled model.


@functools.cache
def routing_of_the_grid() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, dict[str, Any]]:
    """(probabilities, chosen experts) of every layer, the mask and the balance state of the grid's batch."""
    from moe.balance import selection_bias

    config, state = grid.model_config(), grid.train_state(RULES)
    bias_LE = selection_bias(RULES, state.balance, config.exists_LE)
    context = oracle.context_of(grid.batch(), key=state.key, step=int(state.step))
    found = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a))(state.params, context, bias_LE)
    G, S = context.token_BS.shape
    probs = [np.asarray(r.probs_BSE, np.float64) for r in found.routings]
    experts = [np.asarray(r.expert_BR).reshape(G, S, -1) for r in found.routings]
    return probs, experts, np.asarray(context.mask_BS), state.balance


def step(accumulation: int) -> grid.Measured:
    return grid.measured(Cut(accumulation=accumulation))


@pytest.mark.parametrize(
    ("name", "scope"),
    [("global", "global"), ("sequence", "sequence"), ("pairs", 2), ("halves", 16), ("lagged", "global")],
)
def test_the_terms_of_an_accumulated_step_equal_the_loops(name: str, scope: Any) -> None:
    probs, experts, mask, states = routing_of_the_grid()
    for layer in range(grid.LAYERS):
        stale = states["lagged"]["load"][layer] if name == "lagged" else None
        expected = oracle.load_balance(probs[layer], experts[layer], mask, scope, stale)
        np.testing.assert_allclose(step(4).terms[name][layer], expected, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_buffer_uses_the_counts_of_the_micro_batches_so_far(accumulation: int) -> None:
    """After the last micro-batch f is exact; the reported error is the mean distance on the way there."""
    probs, experts, mask, _ = routing_of_the_grid()
    B = grid.SEQUENCES // accumulation
    found = step(accumulation)
    for layer in range(grid.LAYERS):
        exact = np.bincount(experts[layer][mask].reshape(-1), minlength=EXPERTS) / mask.sum() / 2
        value, distance = 0.0, []
        for a in range(accumulation):
            seen, now = slice(0, (a + 1) * B), slice(a * B, (a + 1) * B)
            f = np.bincount(experts[layer][seen][mask[seen]].reshape(-1), minlength=EXPERTS) / mask[seen].sum() / 2
            value += EXPERTS * f @ probs[layer][now][mask[now]].sum(axis=0) / mask.sum()
            distance.append(np.abs(f - exact).sum())
        assert distance[-1] == 0
        np.testing.assert_allclose(found.terms["buffer"][layer], value, rtol=1e-5)
        error = found.reports["balance/buffer/load_error"][layer]
        np.testing.assert_allclose(error, np.mean(distance), rtol=1e-4, atol=1e-9)
        assert (error > 0.01) if accumulation > 1 else (error == 0)
    if accumulation == 1:
        grid.close_trees(found.gradients["buffer"], found.gradients["global"], "buffer", 0)


def test_groups_of_four_that_span_micro_batches_of_two_equal_those_of_one_micro_batch() -> None:
    rule = (LoadBalanceConfig(name="four", scope=4),)
    assert rule[0].needs_prepass(4, 2) and not rule[0].needs_prepass(1, 8) and not rule[0].needs_prepass(2, 4)
    arrays = {name: value[:8] for name, value in grid.batch().items()}
    grid.agree(grid.measure(Cut(accumulation=4), rule, arrays), grid.measure(Cut(), rule, arrays))


def test_lagged_starts_uniform_and_keeps_the_load_of_the_whole_batch() -> None:
    rule = LoadBalanceConfig(accumulation="lagged")
    np.testing.assert_array_equal(rule.init_state(np.ones((2, 8), bool))["load"], np.full((2, 8), 0.125, np.float32))
    logits, mask = example()
    _, experts = routed(logits, mask)
    stats = sums(logits, mask, experts)
    # Uniform f: E * sum_i P_i / E = 1, and no gradient at all.
    np.testing.assert_allclose(term(rule, stats), 1.0, rtol=1e-6)
    whole = jax.tree.map(lambda leaf: leaf[None], stats)
    state = rule.update(rule.init_state(np.ones((1, 5), bool)), whole)
    np.testing.assert_allclose(term(rule, stats, state), term(LoadBalanceConfig(), stats), rtol=1e-6)


def test_only_scopes_that_cross_a_micro_batch_pay_for_a_pre_pass() -> None:
    def asks(A: int, B: int, **fields: Any) -> bool:
        return LoadBalanceConfig(**fields).needs_prepass(A, B)

    assert asks(2, 4, scope="global") and asks(2, 4, scope=8)
    assert not any(asks(1, 8, scope=scope) for scope in ("global", "sequence", 4))
    assert not asks(2, 4, scope="sequence") and not asks(2, 4, scope=2) and not asks(2, 4, scope=4)
    assert not asks(2, 4, accumulation="buffer") and not asks(2, 4, accumulation="lagged")


def test_bad_scopes_and_ignored_knobs_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"scope = 0: must be"):
        check(LoadBalanceConfig(scope=0))
    with pytest.raises(ConfigError, match=r"accumulation = 'buffer': is ignored with scope=2"):
        check(LoadBalanceConfig(scope=2, accumulation="buffer"))
    with pytest.raises(ConfigError, match=r"coefficient = -1: must be at least 0"):
        check(LoadBalanceConfig(coefficient=-1))
    assert next(LoadBalanceConfig(scope=5).batch_problems(2, 8))[1].endswith("one of 1, 2, 4, 8, 16")


def test_load_is_normalised_by_its_own_sum_and_zero_where_nothing_is_counted() -> None:
    count = jnp.array([[1, 0, 3, 0], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(load(count), [[0.25, 0, 0.75, 0], [0, 0, 0, 0]])


def test_the_summary_is_what_its_docstring_says_on_hand_made_loads() -> None:
    count = jnp.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]], jnp.int32)
    per_layer = {"dropped_B": [0, 5, 10], "unserved_B": [0, 5, 2], "tokens_B": [10, 10, 8]}
    found = summary(made(count[None, :, None], **{k: jnp.array(v)[None, :, None] for k, v in per_layer.items()}))
    np.testing.assert_allclose(found["load/max_violation"], [0, 3, 1])
    np.testing.assert_allclose(found["load/entropy"], [1, 0, 0.5], atol=1e-6)
    np.testing.assert_array_equal(found["load/dead"], [0, 3, 2])
    np.testing.assert_allclose(found["load/dropped"], [0, 0.25, 0.5])
    np.testing.assert_allclose(found["load/unserved"], [0, 0.5, 0.25])
