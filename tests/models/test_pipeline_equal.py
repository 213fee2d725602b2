"""A pipelined step is the step: loss, gradients, loads and balance states equal those of one device without stages."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe import axes, param
from moe.axes import MeshConfig
from moe.balance import ExpertBiasConfig, LoadBalanceConfig, QuantileConfig, ShuffledLoadBalanceConfig, ZLossConfig
from moe.config import check
from moe.dispatch import AllToAllConfig, CapacityConfig, ExchangeConfig, RingConfig
from moe.kernels.attend import AttendConfig
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.models.pipeline import PipelineConfig
from moe.routing.base import RouterConfig
from moe.routing.pregate import PreGateConfig
from moe.routing.switch import SwitchConfig
from moe.routing.topk import TopKConfig
from moe.train.run import RunConfig
from moe.train.state import TrainState
from moe.train.step import BATCH_LOGICAL, batch_gradient
from tests.grid import balance_states, close, close_trees
from tests.grid_batch import batch

SEQUENCES, EXPERTS, STEP = 16, 4, 3
ONE, RING = MeshConfig(data=1), RingConfig()
RULES = (
    LoadBalanceConfig(name="global", coefficient=0.5),
    ShuffledLoadBalanceConfig(name="shuffled", sequences=2, coefficient=0.3),
    ZLossConfig(name="z", coefficient=0.2),
    ExpertBiasConfig(name="bias", rate=0.01, scope=8),
)
SWITCH = SwitchConfig(jitter=0.3, init_std=0.3)


class Step(NamedTuple):
    loss: Any
    gradient: Any
    statistics: Any
    states: Any


def model(
    router: RouterConfig = SWITCH, exchange: ExchangeConfig = RING, method: Any = "whole", **changes: Any
) -> DecoderConfig:
    """1 dense layer outside the pipeline, then 4 layers of experts of which a buffer drops some assignments."""
    experts = MoEConfig(
        num_experts=EXPERTS, expert_hidden=8, router=router, dispatch=CapacityConfig(capacity_factor=1.1),
        exchange=exchange,
    )  # fmt: skip
    attend = AttendConfig(method=method, chunk=4) if method != "whole" else AttendConfig()
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_width=8, attend=attend)
    given = {"num_layers": 5, "dense_layers": 1, "mlp_hidden": 16, "moe": experts, "attention": attention}
    return DecoderConfig(**({"vocab_size": 264, "width": 16, "init_std": 0.1} | given | changes))


def step(config: DecoderConfig, mesh: MeshConfig = ONE, A: int = 1, rules: Any = RULES) -> Step:
    run = RunConfig(batch_size=SEQUENCES, accumulation=A, steps=200, mesh=mesh, balance=rules, model=config)
    check(run)
    placed_on = axes.make_mesh(mesh, jax.devices()[: mesh.num_devices])
    whole, abstract = NamedSharding(placed_on, PartitionSpec()), config.abstract()
    zero = np.zeros((), np.int32)
    state = TrainState(
        params=parameters(dataclasses.replace(config, pipeline=None, remat="none")),
        balance=balance_states(rules, exists_LE=config.exists_LE), opt_state=(), step=zero + STEP,
        key=jax.random.key(1), skipped=zero, skipped_in_row=zero, idle_LE=None,
    )  # fmt: skip
    shardings = dataclasses.replace(jax.tree.map(lambda _: whole, state), params=param.shardings(abstract, placed_on))
    arrays = {
        name: jax.device_put(value.reshape(A, SEQUENCES // A, -1), axes.sharding(placed_on, BATCH_LOGICAL))
        for name, value in batch(seed=2, sequences=SEQUENCES).items()
    }

    @jax.jit
    def program(state: TrainState, arrays: Any) -> Step:
        loss, gradient, share = batch_gradient(run, abstract, state, arrays)
        states = {rule.name: rule.update(state.balance[rule.name], share.statistics) for rule in rules}
        # [A, L, B, ...] -> [L, A * B, ...]
        stats = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(leaf.shape[1], -1), share.statistics)
        return Step(loss, gradient, stats, states)

    with jax.set_mesh(placed_on):
        return jax.device_get(program(jax.device_put(state, shardings), arrays))


@functools.cache
def parameters(config: DecoderConfig) -> Any:
    return jax.device_get(jax.jit(lambda: param.pure(config.build(jax.random.key(0))))())


oracle = functools.cache(step)


def same(found: Step, expected: Step) -> None:
    close(found.loss, expected.loss, "loss")
    close_trees(found.gradient, expected.gradient, "gradient")
    close_trees(found.states, expected.states, "states")
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found.statistics), jax.tree.leaves(expected.statistics), strict=True
    )
    for (path, a), b in pairs:
        what = f"statistics{jax.tree_util.keystr(path)}"
        np.testing.assert_array_equal(a, b, what) if np.issubdtype(b.dtype, np.integer) else close(a, b, what)


def test_gpipe_with_experts_and_context_under_accumulation_and_remat_changes_no_number() -> None:
    piped = PipelineConfig(microbatches=4)
    config = model(exchange=AllToAllConfig(), method="ring", pipeline=piped, remat="full")
    found = step(config, MeshConfig(stages=2, data=1, fsdp=2, context=2, expert=4), A=2)
    assert found.statistics.dropped_B.sum() > 0
    same(found, oracle(model()))


def test_interleaved_rounds_with_experts_and_tensor_change_no_number() -> None:
    config = model(pipeline=PipelineConfig(microbatches=4, rounds=2))
    found = step(config, MeshConfig(stages=2, data=1, fsdp=2, tensor=2, expert=2, expert_tensor=2))
    same(found, oracle(model()))


def test_a_router_that_decides_for_all_layers_learns_through_all_stages() -> None:
    config, rules = model(PreGateConfig(num_selected=2), dense_layers=0, mlp_hidden=0, num_layers=4), RULES[:1]
    found = step(
        dataclasses.replace(config, pipeline=PipelineConfig(microbatches=2)), MeshConfig(stages=4, data=1), 1, rules
    )
    same(found, oracle(config, rules=rules))


def test_histograms_over_all_sequences_add_up_over_the_micro_batches() -> None:
    config, rules = model(TopKConfig(init_std=0.3)), (QuantileConfig(name="quantile", bins=11, memory=0.5),)
    found = step(
        dataclasses.replace(config, pipeline=PipelineConfig(microbatches=2)), MeshConfig(stages=2, data=1), 1, rules
    )
    assert found.statistics.below_EH.sum() > 0
    same(found, oracle(config, rules=rules))
