"""The capacity that would drop nothing: by hand, and as the smallest that really drops nothing."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.dispatch import AllToAllConfig, CapacityConfig, DispatchConfig, DroplessConfig, ExchangeConfig, dispatch
from tests.dispatch.test_agreement import B, E, K, S, expert_weights, token_choice


def routing_of(expert_BR: Any) -> Any:
    made = token_choice("full", jnp.ones((B, S * K)))
    expert = jnp.asarray(expert_BR, jnp.int32)
    return dataclasses.replace(
        made, expert_BR=expert, token_BR=made.token_BR[: len(expert)], weight_BR=made.weight_BR[: len(expert)]
    )


def test_the_need_of_experts_is_the_fullest_expert_over_the_even_share() -> None:
    # 12 assignments over 8 experts: 1.5 each. Sequence 0: one expert gets 6; sequence 1: 3; sequence 2: all void.
    rows = [[3] * 6 + [0, 1, 2, 4, 5, 6], [0, 1, 2, 3] * 3, [8] * 12]
    assert CapacityConfig().need(routing_of(rows)).tolist() == [4.0, 2.0, 0.0]
    assert DroplessConfig().need(routing_of(rows)) is None and AllToAllConfig().need(routing_of(rows)) is None


def dropped(dispatch_config: DispatchConfig, exchange: ExchangeConfig, mesh: MeshConfig) -> tuple[np.ndarray, Any]:
    """(need [B], assignments dropped) of the routing with many assignments to two experts."""
    routing = token_choice("two experts", jnp.ones((B, S * K)))
    x = jax.random.normal(jax.random.key(0), (B, S, 8))
    with jax.set_mesh(axes.make_mesh(mesh)):

        @jax.jit
        def run(x: jax.Array) -> Any:
            needs = [part.need(routing) for part in (dispatch_config, exchange)]
            _, count_B = dispatch(dispatch_config.build(), x, routing, expert_weights(), exchange)
            return next(need for need in needs if need is not None), count_B.sum()

        return jax.device_get(run(x))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("mesh", [{"fsdp": 8, "expert": 4}, {"fsdp": 4, "context": 2, "expert": 8}], ids=str)
def test_a_budget_of_the_need_drops_nothing_and_a_smaller_one_does(mesh: dict[str, int], chunks: int) -> None:
    config, plain = MeshConfig(data=1, **mesh), DroplessConfig()
    need_B, _ = dropped(plain, AllToAllConfig(budget=1.0, chunks=chunks), config)
    need = float(need_B.max())
    rows = S * K * B // 8 // chunks  # of a device, in a portion
    ranks = mesh["expert"]
    assert need > 1.5
    assert dropped(plain, AllToAllConfig(budget=need, chunks=chunks), config)[1] == 0
    one_row_less = (math.ceil(need * rows / ranks) - 1) * ranks / rows
    assert dropped(plain, AllToAllConfig(budget=one_row_less, chunks=chunks), config)[1] > 0


def test_a_capacity_of_the_need_drops_nothing_and_a_smaller_one_does() -> None:
    mesh, exchange = MeshConfig(fsdp=8), AllToAllConfig()
    need = float(dropped(CapacityConfig(), exchange, mesh)[0].max())
    assert need == E * S / (S * K)
    assert dropped(CapacityConfig(capacity_factor=need), exchange, mesh)[1] == 0
    assert dropped(CapacityConfig(capacity_factor=need * 0.8), exchange, mesh)[1] > 0
