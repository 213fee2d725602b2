"""The same tokens give the same step, however they are cut. See `tests/grid.py` for what is compared, and how closely.

Guards against: Megatron #3672 (gradient of the global balance loss 1/dp too small), MaxText
`gradient_accumulation.py` (balance gradient divided by the tokens of a micro-batch), Megatron #7197 (counts of
unequal micro-batches divided by the last one's tokens), Megatron #1652 / PR #2217 / PR #5047 (balance and z-loss
rescaled by parallelism), MaxText sign updates from device-local counts and summed over micro-batches, DeepSpeed #5618
and pytorch #160285 (expert gradients times the expert-parallel degree), padding counted in f and P (MaxText,
Levanter, AXLearn, torchtitan PR #4168), counters doubled by recomputation (torchtitan PR #1593, Megatron PR #1585), a
router recomputed to other experts (NeMo-Automodel PR #2635).
"""

import dataclasses
import functools
import itertools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from moe.balance import (
    Batch,
    EntropyConfig,
    ExpertBiasConfig,
    LoadBalanceConfig,
    ShuffledLoadBalanceConfig,
    Statistics,
    ZLossConfig,
    selection_bias,
)
from moe.balance.scope import per_sequence_load
from moe.dispatch import CapacityConfig, DenseConfig
from moe.kernels.attend import AttendConfig
from moe.train.loss import real_targets, share_of_loss
from tests import grid
from tests.grid import EXPERTS, POSITIONS, RULES, Cut, Measured, agree, measure, measured
from tests.oracle import context_of, unrolled

ORACLE = Cut(dispatch=DenseConfig())
LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "1 device": (),
    "data 2": (("data", 2),),
    "context 2": (("data", 2), ("context", 2), ("expert", 2)),
    "data 8": (("data", 8),),
    "fsdp 8": (("fsdp", 8),),
    "expert 8": (("fsdp", 8), ("expert", 8)),
    "2 2 2 1": (("data", 2), ("fsdp", 4), ("expert", 2)),
    "1 2 2 2": (("fsdp", 4), ("tensor", 2), ("expert", 2), ("expert_tensor", 2)),
    "context 4 tensor 2": (("context", 4), ("tensor", 2), ("expert", 4), ("expert_tensor", 2)),
    "fsdp 4 tensor 2": (("fsdp", 4), ("tensor", 2)),
}
ACCUMULATION = (1, 2, 4)
REMAT = ("none", "full", "dots")
PADDING = ("none", "tokens", "sequences")
ATTEND = (AttendConfig(method="ring"), AttendConfig(), AttendConfig(method="gather", chunk=1))
# Every layout at every accumulation; remat and padding rotate so that each pair of values of two factors appears. Where
# positions are cut, so do the ways in which attention meets the keys of other devices.
COVERING = [
    Cut(
        mesh=mesh,
        accumulation=ACCUMULATION[j],
        remat=REMAT[(i + j) % 3],
        padding=PADDING[(i + 2 * j) % 3],
        attend=ATTEND[j] if dict(mesh).get("context") else AttendConfig(),
    )
    for i, mesh in enumerate(LAYOUTS.values())
    for j in range(3)
]
LARGE, SMALL = CapacityConfig(capacity_factor=8.0), CapacityConfig(capacity_factor=0.75)
DISPATCHERS = [
    Cut(mesh=LAYOUTS["1 2 2 2"], accumulation=2, remat="full", dispatch=DenseConfig()),
    Cut(mesh=LAYOUTS["expert 8"], accumulation=4, dispatch=LARGE),
]
DROPPING = [
    Cut(mesh=LAYOUTS["1 2 2 2"], accumulation=4, remat="full", dispatch=SMALL),
    Cut(mesh=LAYOUTS["expert 8"], accumulation=2, padding="sequences", dispatch=SMALL),
]


def test_the_list_covers_every_pair_of_factor_values() -> None:
    values = (tuple(LAYOUTS.values()), ACCUMULATION, REMAT, PADDING)
    rows = [(cut.mesh, cut.accumulation, cut.remat, cut.padding) for cut in COVERING]
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(values[a], values[b]))


@pytest.mark.parametrize("cut", COVERING, ids=str)
def test_every_cut_of_the_batch_is_the_same_step(cut: Cut) -> None:
    agree(measured(cut), measured(ORACLE))
    if cut.padding != "sequences":  # added sequences change which micro-batch a sequence is in
        same = measured(Cut(accumulation=cut.accumulation))
        for name in grid.DEPENDS_ON_ACCUMULATION:
            grid.close(measured(cut).values[name], same.values[name], f"value {name}")
            grid.close_trees(measured(cut).gradients[name], same.gradients[name], f"gradient {name}")


@pytest.mark.parametrize("cut", DISPATCHERS, ids=str)
def test_every_exact_dispatcher_is_the_same_step(cut: Cut) -> None:
    agree(measured(cut), measured(ORACLE))


@pytest.mark.parametrize("cut", DROPPING, ids=str)
def test_a_capacity_limit_drops_the_same_tokens_under_every_cut(cut: Cut) -> None:
    expected = measured(Cut(dispatch=SMALL))
    assert 0 < expected.dropped_LG.sum() < expected.count_LGE.sum() / 2
    agree(measured(cut), expected)


def test_the_batch_is_as_uneven_as_the_grid_needs() -> None:
    found = measured(ORACLE)
    per_micro_batch = found.tokens_G.reshape(4, -1).sum(axis=1)
    assert len(set(per_micro_batch.tolist())) > 2
    assert len(set(found.tokens_G.tolist())) > 5 and (found.tokens_G == 0).any()
    assert found.count_LGE.sum() == 2 * grid.LAYERS * found.tokens_G.sum()
    # Scopes must differ, or a wrong scope would pass.
    values = [
        float(found.values[name]) for name in ("global", "halves", "pairs", "sequence", "lagged", "devices", "shuffled")
    ]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.combinations(values, 2))


def test_the_top_k_margin_of_the_inputs_is_wider_than_rounding() -> None:
    config = grid.model_config()
    state = grid.train_state(RULES)
    bias_LE = selection_bias(RULES, state.balance, config.exists_LE)
    context = context_of(grid.batch(), key=state.key, step=int(state.step))
    found = jax.jit(lambda *a: unrolled(config.abstract(), *a))(state.params, context, bias_LE)
    margins = [routing.margin_BS.min() for routing in found.routings]
    assert min(map(float, margins)) > 1e-5  # scores in [0, 1] carry rounding of about 1e-7


# Deliberately wrong implementations: each must be caught by the comparison that the grid makes.

FEW = (
    LoadBalanceConfig(name="global"),
    LoadBalanceConfig(name="sequence", scope="sequence"),
    EntropyConfig(name="entropy"),
    ShuffledLoadBalanceConfig(name="shuffled"),
    ZLossConfig(name="z"),
    ExpertBiasConfig(name="sign", rate=0.01),
)
PLAIN_TERM, PLAIN_UPDATE = LoadBalanceConfig.term, ExpertBiasConfig.update
PLAIN_ENTROPY, PLAIN_SHUFFLED = EntropyConfig.term, ShuffledLoadBalanceConfig.term
PLAIN_SAMPLE = ShuffledLoadBalanceConfig.sampled_load


def over_accumulation(self: Any, micro: Any, batch: Batch, carry: Any, state: Any) -> Any:
    value, carry, record = PLAIN_TERM(self, micro, batch, carry, state)
    return value / batch.num_microbatches, carry, record


def over_devices(self: Any, micro: Any, batch: Batch, carry: Any, state: Any) -> Any:
    value, carry, record = PLAIN_TERM(self, micro, batch, carry, state)
    return value / jax.sharding.get_abstract_mesh().size, carry, record


def gradient_only_over_devices(self: Any, micro: Any, batch: Batch, carry: Any, state: Any) -> Any:
    value, carry, record = PLAIN_TERM(self, micro, batch, carry, state)
    n = jax.sharding.get_abstract_mesh().size
    return value / n + jax.lax.stop_gradient(value * (1 - 1 / n)), carry, record


def load_of_the_micro_batch(self: Any, micro: Statistics, batch: Batch, carry: Any, state: Any) -> Any:
    f = per_sequence_load(micro.count_BE, micro.count_BE.shape[1])
    return EXPERTS * (f * micro.prob_BE).sum(axis=(1, 2)) / batch.num_tokens, carry, ()


def tokens_of_the_micro_batch(self: Any, micro: Statistics, batch: Batch, carry: Any, state: Any) -> Any:
    mean = batch._replace(num_tokens=micro.tokens_B[0].sum() * float(batch.num_microbatches))
    return PLAIN_TERM(self, micro, mean, carry, state)


def one_update_a_micro_batch(self: Any, state: Any, whole: Statistics) -> Any:
    for a in range(whole.count_BE.shape[0]):
        state = PLAIN_UPDATE(self, state, jax.tree.map(lambda leaf, a=a: leaf[a : a + 1], whole))
    return state


def padding_in_the_counts(routing: Any, mask: jax.Array, dropped: jax.Array, **keep: Any) -> Statistics:
    from moe.balance.statistics import statistics

    sums = statistics(routing, mask, dropped, **keep)
    padding_B = (~mask).sum(axis=1)
    return dataclasses.replace(sums, count_BE=sums.count_BE.at[:, 0].add(padding_B))


def padding_in_the_mean(index: Any, A: int, num_tokens: Any, *rest: Any) -> Batch:
    return Batch(index, A, jnp.float32(grid.SEQUENCES * (POSITIONS + 8)), *rest)


def entropy_of_the_micro_batch(self: Any, micro: Statistics, batch: Batch, carry: Any, state: Any) -> Any:
    return PLAIN_ENTROPY(self, micro, batch._replace(num_microbatches=1), carry, state)


def sample_of_the_micro_batch(self: Any, micro: Statistics, batch: Batch, carry: Any, state: Any) -> Any:
    return PLAIN_SHUFFLED(self, micro, batch._replace(num_microbatches=1, microbatch=0), carry, state)


def sample_by_the_index_in_the_micro_batch(self: Any, whole: Statistics, key: Any) -> Any:
    parts = [PLAIN_SAMPLE(self, jax.tree.map(lambda leaf, a=a: leaf[a : a + 1], whole), key) for a in range(2)]
    return jnp.concatenate(parts, axis=1) if whole.count_BE.shape[0] == 2 else PLAIN_SAMPLE(self, whole, key)


def mean_of_micro_batch_means(*args: Any, **kwargs: Any) -> Any:
    *first, arrays, batch, _ = args
    own = real_targets(arrays["segment_ids"]).sum() * float(batch.num_microbatches)
    return share_of_loss(*first, arrays, batch, own, **kwargs)


A2, DATA8, TOKENS = Cut(accumulation=2), Cut(mesh=LAYOUTS["data 8"]), Cut(padding="tokens")
WRONG: list[tuple[str, Any, Cut, str]] = [
    ("moe.balance.load_balance.LoadBalanceConfig.term", over_accumulation, A2, "value global"),
    ("moe.balance.load_balance.LoadBalanceConfig.term", over_devices, DATA8, "value global"),
    ("moe.balance.load_balance.LoadBalanceConfig.term", gradient_only_over_devices, DATA8, "gradient global"),
    ("moe.balance.load_balance.LoadBalanceConfig.term", load_of_the_micro_batch, A2, "value global"),
    ("moe.balance.load_balance.LoadBalanceConfig.term", tokens_of_the_micro_batch, A2, "value global"),
    ("moe.balance.expert_bias.ExpertBiasConfig.update", one_update_a_micro_batch, A2, "state sign"),
    ("moe.balance.mean_probability.MeanProbabilityRule.term", entropy_of_the_micro_batch, A2, "value entropy"),
    ("moe.balance.shuffled.ShuffledLoadBalanceConfig.term", sample_of_the_micro_batch, A2, "value shuffled"),
    (
        "moe.balance.shuffled.ShuffledLoadBalanceConfig.sampled_load",
        sample_by_the_index_in_the_micro_batch,
        A2,
        "value shuffled",
    ),
    ("moe.layers.moe.statistics", padding_in_the_counts, TOKENS, "load"),
    ("moe.train.step.Batch", padding_in_the_mean, TOKENS, "value global"),
    ("moe.train.step.share_of_loss", mean_of_micro_batch_means, A2, "value lm"),
]


@functools.cache
def few() -> Measured:
    return measure(Cut(), FEW)


@pytest.mark.parametrize(
    ("target", "wrong", "cut", "caught_by"), WRONG, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_deliberately_wrong_step_is_caught(target: str, wrong: Any, cut: Cut, caught_by: str) -> None:
    expected = few()
    with mock.patch(target, wrong):
        found = measure(cut, FEW)
    with pytest.raises(AssertionError, match=caught_by):
        agree(found, expected)


def test_a_wrong_load_breaks_exact_equality_by_one_count() -> None:
    found = few()
    count = found.count_LGE.copy()
    count[0, 0, 0] += 1
    with pytest.raises(AssertionError, match="load"):
        agree(dataclasses.replace(found, count_LGE=count), found)
