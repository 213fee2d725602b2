"""Load between groups of experts, a scope that is switched at a step, and a small sequence-level term beside a global.

Guards against: the bias of routers that do not read it, a coefficient of 0 that changes the gradient all the same,
device losses that are not 1 at balance.
"""

from typing import Any

import jax
import numpy as np
import pytest

from moe.balance import ExpertBiasConfig, LoadBalanceConfig, QuantileConfig, ZLossConfig
from moe.config import ConfigError, check
from moe.models import DecoderConfig
from moe.routing.hashed import HashConfig
from moe.train.run import RunConfig
from moe.train.step import batch_gradient
from tests import grid
from tests.balance.examples import layers, logits_and_mask, sums, whole_term

E = 6


def value(rule: LoadBalanceConfig, stats: Any, A: int = 1, **how: Any) -> np.ndarray:
    found = whole_term(rule, stats, A, **how)[0]
    assert found is not None
    return np.asarray(found)


@pytest.mark.parametrize("groups", [2, 3])
def test_the_loss_between_groups_equals_the_sums_over_each_group(groups: int) -> None:
    """DeepSeek's device loss: f'_g the mean of f over the group in units of 1 / E, P'_g the sum of P."""
    logits, mask = logits_and_mask(E=E)
    stats = sums(logits, mask)
    f = np.asarray(stats.count_BE[0].sum(axis=0), float)
    f, P = f / f.sum(), np.asarray(stats.prob_BE[0].sum(axis=0)) / mask.sum()
    expected = 0.0
    for g in range(groups):
        members = range(g * E // groups, (g + 1) * E // groups)
        expected += np.mean([E * f[i] for i in members]) * sum(P[i] for i in members)
    found = value(LoadBalanceConfig(expert_groups=groups), stats)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    assert abs(found[0] - value(LoadBalanceConfig(), stats)[0]) > 1e-2


def test_imbalance_inside_a_group_costs_nothing_and_between_groups_the_number_of_groups() -> None:
    mask = np.ones((2, 4), bool)
    inside = np.full((2, 4, 4), -60.0, np.float32)
    inside[0, :, 0] = inside[1, :, 2] = 60.0  # experts 0 and 2 do all the work, one of each group
    between = np.full((2, 4, 4), -60.0, np.float32)
    between[:, ::2, 0] = between[:, 1::2, 1] = 60.0  # both of the first group
    rule = LoadBalanceConfig(expert_groups=2)
    np.testing.assert_allclose(value(rule, sums(jax.numpy.asarray(inside), mask, K=1)), [1.0], rtol=1e-6)
    np.testing.assert_allclose(value(rule, sums(jax.numpy.asarray(between), mask, K=1)), [2.0], rtol=1e-6)
    np.testing.assert_allclose(value(LoadBalanceConfig(), sums(jax.numpy.asarray(inside), mask, K=1)), [2.0], rtol=1e-6)


def test_groups_of_layers_with_other_numbers_of_experts_are_their_own_runs() -> None:
    (logits, mask), (narrow, _) = logits_and_mask(E=6), logits_and_mask(E=4, seed=7)
    rule = LoadBalanceConfig(expert_groups=2)
    both = value(rule, layers(sums(logits, mask), sums(narrow, mask)))
    np.testing.assert_allclose(both[0], value(rule, sums(logits, mask))[0], rtol=1e-6)
    np.testing.assert_allclose(both[1], value(rule, sums(narrow, mask))[0], rtol=1e-6)


@pytest.mark.parametrize(("first", "then"), [("sequence", "global"), ("global", "sequence"), (2, 4)])
@pytest.mark.parametrize("A", [1, 4])
def test_the_scope_is_switched_at_its_step_in_both_directions(first: Any, then: Any, A: int) -> None:
    logits, mask = logits_and_mask(E=E)
    stats = sums(logits, mask)
    rule = LoadBalanceConfig(scope=first, scope_after=then, switch_step=10)
    for step, scope in ((0, first), (9, first), (10, then), (11, then)):
        np.testing.assert_array_equal(
            value(rule, stats, A, step=step), value(LoadBalanceConfig(scope=scope), stats, A, step=step)
        )
    assert value(rule, stats, A, step=9) != value(rule, stats, A, step=10)
    off = whole_term(
        LoadBalanceConfig(scope=first, scope_after=then, switch_step=10, coefficient=0.0), stats, 4, step=10
    )
    logged = off[0] if off[0] is not None else off[1]["balance/load_balance"]
    np.testing.assert_allclose(logged, value(rule, stats, 4, step=10), rtol=1e-6)


def test_a_switch_pays_for_the_pre_pass_if_either_side_needs_it() -> None:
    def asks(**fields: Any) -> bool:
        return LoadBalanceConfig(switch_step=5, **fields).needs_prepass(2, 4)

    assert asks(scope="sequence", scope_after="global") and asks(scope="global", scope_after="sequence")
    assert not asks(scope="sequence", scope_after=4)
    assert not asks(scope="sequence", scope_after="global", accumulation="buffer")
    assert not asks(scope="sequence", scope_after="global", coefficient=0.0)


def test_a_switch_to_the_buffer_uses_the_buffer_on_its_side_alone() -> None:
    logits, mask = logits_and_mask(E=E)
    stats = sums(logits, mask)
    rule = LoadBalanceConfig(scope="sequence", scope_after="global", switch_step=10, accumulation="buffer")
    buffer = LoadBalanceConfig(accumulation="buffer")
    np.testing.assert_array_equal(value(rule, stats, 4, step=10), value(buffer, stats, 4))
    np.testing.assert_array_equal(value(rule, stats, 4, step=9), value(LoadBalanceConfig(scope="sequence"), stats, 4))
    assert value(buffer, stats, 4) != value(LoadBalanceConfig(), stats, 4)


def gradient(*rules: Any) -> Any:
    config = RunConfig(batch_size=8, accumulation=2, steps=200, balance=rules, model=grid.model_config())
    state = grid.train_state(rules)
    arrays = {name: value[:8].reshape(2, 4, -1) for name, value in grid.batch().items()}
    run = jax.jit(lambda state, arrays: batch_gradient(config, config.model.abstract(), state, arrays)[:2])
    return jax.device_get(run(state, arrays))


def test_a_sequence_term_of_weight_zero_beside_a_global_one_changes_no_bit() -> None:
    main = LoadBalanceConfig(coefficient=0.01)
    alone = gradient(main)
    with_zero = gradient(main, LoadBalanceConfig(name="small", scope="sequence", coefficient=0.0))
    with_some = gradient(main, LoadBalanceConfig(name="small", scope="sequence", coefficient=1e-4))
    jax.tree.map(np.testing.assert_array_equal, alone, with_zero)
    assert alone[0] != with_some[0]


def test_options_that_cannot_work_or_would_be_ignored_are_refused_by_name() -> None:
    refused = [
        ({"expert_groups": 1}, "expert_groups = 1: must be 0 or at least 2"),
        ({"switch_step": 5}, "switch_step = 5: is ignored without scope_after"),
        ({"scope_after": "sequence"}, "switch_step = 0: must be at least 1"),
        ({"scope_after": "global", "switch_step": 5}, "scope_after = 'global': must differ from scope"),
        ({"scope_after": 0, "switch_step": 5}, "scope_after = 0: must be"),
        (
            {"scope": 2, "scope_after": 4, "switch_step": 5, "accumulation": "lagged"},
            "accumulation = 'lagged': is ignored",
        ),
    ]
    for fields, message in refused:
        with pytest.raises(ConfigError, match=message):
            check(LoadBalanceConfig(**fields))
    check(LoadBalanceConfig(scope=2, scope_after="global", switch_step=5, accumulation="lagged"))


def run(*rules: Any, model: DecoderConfig | None = None) -> RunConfig:
    return RunConfig(batch_size=8, steps=200, balance=rules, model=model or grid.model_config())


def test_a_run_refuses_rules_that_do_not_fit_its_model() -> None:
    with pytest.raises(ConfigError, match=r"balance.1.expert_groups = 3: must divide, and be less than, the 8 experts"):
        check(run(ZLossConfig(), LoadBalanceConfig(expert_groups=3)))
    with pytest.raises(ConfigError, match=r"balance.0.scope_after = 3: must divide the 8 sequences"):
        check(run(LoadBalanceConfig(scope_after=3, switch_step=9)))
    with pytest.raises(ConfigError, match=r"balance = .*balance rule 'b' asks for shortfall = \(1.0, 11\), another"):
        check(run(QuantileConfig(name="a"), QuantileConfig(name="b", bins=11)))


@pytest.mark.parametrize("rule", [ExpertBiasConfig(), QuantileConfig()])
def test_a_bias_that_the_router_does_not_read_is_refused(rule: Any) -> None:
    deaf = grid.model_config(router=HashConfig())
    check(run(model=deaf))
    with pytest.raises(ConfigError, match=rf"balance.0.name = '{rule.name}': moves the expert bias, which HashConfig"):
        check(run(rule, model=deaf))


def test_a_term_that_no_router_could_learn_from_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"balance.0.coefficient = 0.001: weighs a constant: HashConfig has nothing to"
    ):
        check(run(ZLossConfig(), model=grid.model_config(router=HashConfig())))
    check(run(ZLossConfig(coefficient=0.0), model=grid.model_config(router=HashConfig())))
