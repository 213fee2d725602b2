"""What every balance rule promises. A new rule is met here without a line: its config is found by its base class.

A rule whose default config is not a fair example may add its variants to VARIANTS.

Guards against: MaxText (balance gradient divided by the tokens of a micro-batch), Megatron #3672 and #1652 (rescaled by
parallelism), padding in f and P (MaxText, Levanter, AXLearn), NaN from an empty micro-batch, a configured loss that
never reaches the gradient (MaxText PRs #3664 and #4829), Jensen: the entropy of a micro-batch's mean (AXLearn).
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe.balance
from moe.balance import BalanceRule
from moe.config import check
from moe.train.run import RunConfig
from moe.train.state import init_state, make_optimizer
from moe.train.step import make_step
from tests import grid
from tests.balance.examples import SHORTFALL, cut, exists, layers, logits_and_mask, sums, whole_term

G, S, E, NARROW = 8, 6, 6, 4
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "LoadBalanceConfig": [
        {"scope": "sequence"},
        {"scope": 4},
        {"accumulation": "buffer"},
        {"accumulation": "lagged"},
        {"expert_groups": 2},
        {"scope": "sequence", "scope_after": "global", "switch_step": 3},
        {"scope": 4, "scope_after": "sequence", "switch_step": 4},
    ],
    "EntropyConfig": [{"scope": 2}],
    "ImportanceConfig": [{"scope": 4}],
    "ExpertBiasConfig": [{"rule": "proportional", "scope": 2}, {"recentre": True}],
    "QuantileConfig": [{"memory": 0.5, "bins": SHORTFALL[1]}],
}
DEPENDS_ON_ORDER = {("LoadBalanceConfig", "buffer")}
"""Declared by their docstrings."""


def rule_types(base: type[BalanceRule] = BalanceRule) -> Iterator[type[BalanceRule]]:
    for module in pkgutil.iter_modules(moe.balance.__path__):
        importlib.import_module(f"moe.balance.{module.name}")
    for cls in base.__subclasses__():
        if cls.__module__.startswith("moe.") and cls.__name__.endswith("Config"):
            yield cls
        yield from rule_types(cls)


DEFAULTS: dict[str, dict[str, Any]] = {
    "QuantileConfig": {"bins": SHORTFALL[1]},
    "ShuffledLoadBalanceConfig": {"sequences": 2},
}
CONFIGS = [
    cls(**(DEFAULTS.get(cls.__name__, {}) | v))
    for cls in dict.fromkeys(rule_types())
    for v in [{}, *VARIANTS.get(cls.__name__, [])]
]
label = lambda rule: f"{type(rule).__name__[:-6]}-{CONFIGS.index(rule)}"  # noqa: E731
each_rule = pytest.mark.parametrize("rule", CONFIGS, ids=label)
each_term = pytest.mark.parametrize("rule", [rule for rule in CONFIGS if not rule.moves_bias], ids=label)
each_state = pytest.mark.parametrize("rule", [r for r in CONFIGS if r.init_state(np.ones((1, E), bool))], ids=label)


def declared(rule: BalanceRule) -> bool:
    return (type(rule).__name__, getattr(rule, "accumulation", "")) in DEPENDS_ON_ORDER


def renaming(rule: BalanceRule) -> np.ndarray:
    """A permutation of the experts that keeps the rule's groups of them together."""
    return np.array([4, 3, 5, 0, 2, 1]) if getattr(rule, "expert_groups", 0) else np.array([4, 0, 5, 1, 3, 2])


@functools.cache
def measured(rule: BalanceRule) -> dict[str, Any]:
    """Everything the tests of one term look at, from one program: (value_L, gradient in the logits) by case."""
    logits, mask = logits_and_mask(G, S, E)
    order = renaming(rule)
    garbage = 9.0 * jnp.ones((G, 2, E))

    def value(z: jax.Array, mask: np.ndarray, A: int, **how: Any) -> Any:
        found = whole_term(rule, sums(z, mask), A, **how)[0]
        assert found is not None
        return found.sum(), found

    def both(z: jax.Array, mask: np.ndarray, A: int, **how: Any) -> Any:
        (_, value_L), gradient = jax.value_and_grad(value, has_aux=True)(z, mask, A, **how)
        return value_L, gradient

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
    def everything(z: jax.Array) -> dict[str, Any]:
        wide, slim = sums(z, mask), sums(logits_and_mask(G, S, NARROW, seed=7)[0], mask)
        return {
            "A1": both(z, mask, 1),
            "A2": both(z, mask, 2),
            "A4": both(z, mask, 4),
            "reversed": both(z, mask, 4, order=(3, 2, 1, 0)),
            "more positions": both(jnp.concatenate([z, garbage], axis=1), np.pad(mask, ((0, 0), (0, 2))), 2),
            "more sequences": both(jnp.concatenate([z, z]), np.pad(mask, ((0, G), (0, 0))), 2),
            "renamed": both(z[..., order], mask, 2),
            "empty": both(z, np.zeros_like(mask), 2),
            "mixed": whole_term(rule, layers(wide, slim), 2)[0],
            "wide": whole_term(rule, layers(wide, wide), 2)[0],
            "slim": whole_term(rule, layers(slim, slim), 2)[0],
        }

    return jax.device_get(everything(logits)) | {"mask": mask}


@each_term
@pytest.mark.parametrize("case", ["A2", "A4", "reversed"])
def test_the_term_is_that_of_the_whole_batch_however_it_is_cut(rule: BalanceRule, case: str) -> None:
    """A = 1 is differentiated as it is: the gradient of a cut batch is the autodiff of the full-batch formula."""
    found = measured(rule)
    if declared(rule):
        assert rule.depends_on_order
        assert not np.allclose(found[case][0], found["A1"][0], rtol=1e-4)
        assert case != "reversed" or not np.allclose(found[case][0], found["A4"][0], rtol=1e-4), "the order is not seen"
        return
    np.testing.assert_allclose(found[case][0], found["A1"][0], rtol=2e-6)
    np.testing.assert_allclose(found[case][1], found["A1"][1], atol=2e-7)
    assert getattr(rule, "accumulation", "") == "lagged" or np.abs(found["A1"][1]).max() > 1e-3


@each_term
@pytest.mark.parametrize("case", ["more positions", "more sequences"])
def test_padding_adds_nothing(rule: BalanceRule, case: str) -> None:
    found = measured(rule)
    value_L, gradient = found[case]
    if not (declared(rule) and case == "more sequences"):  # which then fill a micro-batch of their own
        np.testing.assert_allclose(value_L, found["A2"][0], rtol=2e-6)
        np.testing.assert_allclose(gradient[:G, :S], found["A2"][1], atol=2e-7)
    assert not gradient[:, S:].any() and not gradient[G:].any() and not gradient[:G, :S][~found["mask"]].any()


@each_term
def test_a_batch_of_nothing_but_padding_costs_nothing_and_is_finite(rule: BalanceRule) -> None:
    value_L, gradient = measured(rule)["empty"]
    np.testing.assert_array_equal(value_L, [0])
    assert not gradient.any()


@each_term
def test_renaming_experts_changes_no_value(rule: BalanceRule) -> None:
    found, order = measured(rule), renaming(rule)
    np.testing.assert_allclose(found["renamed"][0], found["A2"][0], rtol=2e-6)
    np.testing.assert_allclose(found["renamed"][1], found["A2"][1][..., order], atol=2e-7)


@each_term
def test_a_layer_beside_a_wider_one_costs_what_it_costs_by_itself(rule: BalanceRule) -> None:
    """Both layers of a stack of equals hold the same statistics, so the layer's index, which keys a draw, is kept."""
    found = measured(rule)
    np.testing.assert_allclose(found["mixed"][0], found["wide"][0], rtol=2e-6)
    np.testing.assert_allclose(found["mixed"][1], found["slim"][1], rtol=2e-6)


@each_term
def test_without_a_coefficient_there_is_no_pre_pass_and_the_value_is_logged_all_the_same(rule: BalanceRule) -> None:
    off = dataclasses.replace(rule, coefficient=0.0)
    assert rule.weighs and not off.weighs and not off.needs_prepass(4, 2)
    logits, mask = logits_and_mask(G, S, E)
    value_L, report = whole_term(off, sums(logits, mask), 4)
    value_L = report[f"balance/{rule.name}"] if value_L is None else value_L
    np.testing.assert_allclose(value_L, measured(rule)["A4"][0], rtol=2e-6)


@each_rule
def test_only_a_rule_with_a_term_may_weigh(rule: BalanceRule) -> None:
    assert (rule.coefficient == 0) == rule.moves_bias
    check(rule)
    logits, mask = logits_and_mask(G, S, E)
    assert (whole_term(rule, sums(logits, mask))[0] is None) == rule.moves_bias


@each_state
def test_the_state_is_a_flat_dict_of_arrays_that_an_update_keeps_in_shape(rule: BalanceRule) -> None:
    logits, mask = logits_and_mask(G, S, E)
    stats = sums(logits, mask)
    state = rule.init_state(exists(stats))
    after = rule.update(state, cut(stats, 2))
    assert all(isinstance(name, str) and isinstance(value, jax.Array) for name, value in state.items())
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
    assert not np.allclose(*jax.tree.leaves((state, after)))
    for A in (1, 4):
        again = rule.update(state, cut(stats, A))
        np.testing.assert_array_equal(*jax.tree.leaves((again, after)))


@each_state
def test_the_state_of_a_narrow_layer_is_its_own_and_padding_moves_nothing(rule: BalanceRule) -> None:
    (logits, mask), (narrow, _) = logits_and_mask(G, S, E), logits_and_mask(G, S, NARROW, seed=7)
    wide, slim = sums(logits, mask), sums(narrow, mask)

    def updated(stats: Any) -> np.ndarray:
        (found,) = rule.update(rule.init_state(exists(stats)), cut(stats, 2)).values()
        return np.asarray(found)

    both = updated(layers(wide, slim))
    np.testing.assert_allclose(both[0], updated(wide)[0], atol=1e-7)
    np.testing.assert_allclose(both[1, :NARROW], updated(slim)[0], atol=1e-7)
    assert not both[1, NARROW:].any()
    (empty,) = rule.update(rule.init_state(np.ones((1, E), bool)), cut(sums(logits, np.zeros_like(mask)), 2)).values()
    assert np.isfinite(empty).all() and (not rule.moves_bias or not empty.any())


@each_state
def test_renaming_experts_renames_the_state(rule: BalanceRule) -> None:
    logits, mask = logits_and_mask(G, S, E)
    order, start = renaming(rule), rule.init_state(np.ones((1, E), bool))
    (plain,) = rule.update(start, cut(sums(logits, mask), 2)).values()
    (renamed,) = rule.update(start, cut(sums(logits[..., order], mask), 2)).values()
    np.testing.assert_allclose(renamed, plain[:, order], atol=1e-7)


def test_every_term_and_every_bias_appears_in_the_log_under_its_name() -> None:
    rules = tuple(dataclasses.replace(rule, name=f"rule{i}") for i, rule in enumerate(CONFIGS))
    config = RunConfig(batch_size=8, accumulation=2, steps=200, balance=rules, model=grid.model_config())
    check(config)
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    names = ("tokens", "segment_ids", "positions", "domains")
    arrays = dict.fromkeys(names, jax.ShapeDtypeStruct((2, 4, 17), jnp.int32))
    state = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))
    _, metrics = jax.eval_shape(make_step(config, model, tx), state, arrays)
    for rule in rules:
        if rule.moves_bias:
            assert metrics[f"balance/{rule.name}/range"].shape == (grid.LAYERS,)
        else:
            assert metrics[f"balance/{rule.name}"].shape == (grid.LAYERS,)
            assert metrics[f"loss/{rule.name}"].shape == metrics[f"weight/{rule.name}"].shape == ()


def test_every_rule_of_the_package_is_met() -> None:
    met = {type(rule).__name__ for rule in CONFIGS}
    assert met >= {"LoadBalanceConfig", "EntropyConfig", "QuantileConfig", "ShuffledLoadBalanceConfig"}
    assert met == {type(rule).__name__ for rule in grid.RULES}, "every rule goes through the grid"
