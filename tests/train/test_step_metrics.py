"""The numbers of the routing in the log, each from counts small enough to do by hand."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import Statistics, idle_steps, summary
from moe.balance.statistics import LOAD_EDGES, stack_layers
from moe.train.checkpoint import Checkpoints
from moe.train.run import CheckpointConfig
from moe.train.state import TrainState
from moe.train.step_metrics import _idle, _range
from tests.balance.made import made


def whole(count: object, **changes: object) -> Statistics:
    """Statistics [A, L, B, E] of these counts; two assignments a token."""
    count_BE = jnp.asarray(count, jnp.int32)
    tokens_B = count_BE.sum(axis=-1) // 2
    return made(count_BE, **{"tokens_B": tokens_B} | changes)


def test_every_expert_is_in_one_bin_of_the_histogram() -> None:
    # 1000 assignments over 8 experts: even share 125. Relative load 0, 0.008, 0.01, 0.24, 0.5, 0.8, 2, 4.44 ...
    counts = [0, 1, 10, 30, 63, 100, 250, 546]
    found = summary(whole([[[counts]]]))
    bins = {low: int(found[f"load/histogram/from_{low:g}"][0]) for low in LOAD_EDGES}
    assert bins == {0.0: 2, 0.01: 2, 0.25: 0, 0.5: 1, 0.8: 1, 1.25: 0, 2.0: 1, 4.0: 1}
    assert found["load/dead"][0] == 2


def test_experts_that_a_layer_does_not_have_are_in_no_bin_and_not_dead() -> None:
    parts = [whole([[[[4, 4, 0, 8]]]]), whole([[[[6, 2]]]])]
    stacked = stack_layers([(jax.tree.map(lambda leaf: leaf[0], one), E) for one, E in zip(parts, (4, 2), strict=True)])
    found = summary(jax.tree.map(lambda leaf: leaf[None], stacked))
    total = sum(np.asarray(found[f"load/histogram/from_{low:g}"]) for low in LOAD_EDGES)
    assert total.tolist() == [4, 2] and found["load/dead"].tolist() == [1, 0]
    np.testing.assert_allclose(found["load/max_violation"], [1.0, 0.5])
    bias_LE = jnp.array([[0.5, 0.2, 0.3, 0.4], [0.5, 0.3, 0.0, 0.0]])
    np.testing.assert_allclose(_range(bias_LE, stacked.exists_LE), [0.3, 0.2], rtol=1e-6)


def test_micro_batches_are_violated_more_than_their_sum() -> None:
    # Two sequences a micro-batch: (6, 2) and (2, 6) are even together; the third micro-batch is padding.
    count_ALBE = [[[[4, 0], [2, 2]]], [[[1, 3], [1, 3]]], [[[0, 0], [0, 0]]]]
    found = summary(whole(count_ALBE))
    assert found["load/max_violation"].tolist() == [0.0]
    assert found["load/max_violation_micro"].tolist() == [0.5]  # 2 * 6/8 - 1 in both


def test_margin_and_chosen_probability_are_means_over_real_tokens() -> None:
    count_ALBE = [[[[4, 4], [0, 0]]], [[[2, 2], [2, 2]]]]  # 4, 0, 2, 2 tokens
    sums = jnp.array([[[3.0, 0.0]], [[1.0, 2.0]]])
    found = summary(whole(count_ALBE, chosen_prob_B=sums, margin_B=sums / 4))
    assert found["router/chosen_prob"].tolist() == [0.75] and found["router/margin"].tolist() == [0.1875]


def test_idle_experts_are_counted_until_a_token_comes() -> None:
    idle_LE = jnp.zeros((1, 3), jnp.int32)
    seen = []
    for counts in ([2, 2, 0], [4, 0, 0], [0, 4, 0], [0, 3, 1]):
        idle_LE = idle_steps(idle_LE, whole([[[counts, [0, 0, 0]]]]))
        seen.append(idle_LE[0].tolist())
    assert seen == [[0, 0, 1], [0, 1, 2], [1, 0, 3], [2, 0, 0]]
    found = _idle(jnp.array([[0, 2, 5], [0, 0, 0]], jnp.int32))
    assert found["load/idle_max"].tolist() == [5, 0] and found["load/idle_mean"].tolist() == [3.5, 0.0]


def test_experts_that_do_not_exist_do_not_wait() -> None:
    stats = dataclasses.replace(whole([[[[2, 0, 0, 0]], [[2, 0, 0, 0]]]]), widths=(4, 2))
    assert idle_steps(jnp.zeros((2, 4), jnp.int32), stats).tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("idle_LE", [jnp.array([[3, 0], [1, 7]], jnp.int32), None], ids=["experts", "dense"])
def test_waiting_goes_on_after_a_checkpoint(idle_LE: jax.Array | None, tmp_path: Path) -> None:
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        params={"w": jnp.ones(2)}, balance={}, opt_state=(), step=zero + 5, key=jax.random.key(0), skipped=zero,
        skipped_in_row=zero, idle_LE=idle_LE,
    )  # fmt: skip
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(5, state, {}, None)
    restored, _ = checkpoints.restore(5, lambda: state, where)
    checkpoints.close()
    if idle_LE is None:
        assert restored.idle_LE is None
    else:
        np.testing.assert_array_equal(restored.idle_LE, idle_LE)
        assert restored.idle_LE is not None and restored.idle_LE.dtype == jnp.int32
