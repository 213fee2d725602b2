"""What the exchanges send, read from compiled programs.

Guards against: tensor-parallel copies of a token that all travel (TED's baseline), activations sent a second time when
a layer is recomputed, expert gradients reduced over devices that hold other experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe.axes import EXPERT_DATA
from moe.dispatch import AllToAllConfig, DenseConfig, DroplessConfig, ExchangeConfig, RingConfig, dispatch
from moe.models.remat import recomputed
from moe.plan.collectives import Collective, collectives
from moe.plan.hlo import Program
from tests.dispatch.cases import FOLDINGS, D, F, K, inputs, listed, mesh_of, placed, routing
from tests.grid import close

TED = "fsdp 2 tensor 2, expert 2 2"


@functools.cache
def sent(folding: str, exchange: ExchangeConfig, remat: str = "none") -> list[Collective]:
    """The collectives of one layer's forward and backward pass."""
    token, expert, _ = listed("full")
    mesh = mesh_of(FOLDINGS[folding] or {})

    def value(x, combine, weights, token, expert):
        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            listed = routing(token, expert, combine, K)
            return x + dispatch(DroplessConfig().build(), x, listed, weights, exchange)[0], None

        # Two layers in a loop, as a stack runs them: XLA cannot unite a layer's two passes.
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weights)
        return (jax.lax.scan(recomputed(layer, remat), x, twice)[0] ** 2).sum()

    with jax.set_mesh(mesh):
        values = placed(mesh, (*inputs(), token, expert))
        text = jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(*values).compile().as_text() or ""
    return collectives(Program(text), mesh.shape)


def total(found: list[Collective], kind: str) -> int:
    return sum(one.sent for one in found if one.kind == kind)


def test_with_tensor_parallelism_2_dropping_duplicate_tokens_halves_the_bytes_of_the_all_to_all() -> None:
    once, twice = (total(sent(TED, AllToAllConfig(drop_duplicates=drop)), "all-to-all") for drop in (True, False))
    assert twice == 2 * once > 0


def test_saved_collectives_are_not_sent_again() -> None:
    none, saved, full = (sent(TED, AllToAllConfig(), remat) for remat in ("none", "collectives", "full"))
    kinds = "all-to-all", "all-gather", "reduce-scatter"
    assert [total(saved, kind) for kind in kinds] == [total(none, kind) for kind in kinds]
    # Sent again: of three, the rows and what is known of them; the way back is linear and its result not needed.
    out = [one for one in full if one.kind == "all-to-all" and "rematted" in one.origin]
    assert sum(one.sent for one in out) == total(full, "all-to-all") - total(none, "all-to-all") > 0
    assert total(full, "all-gather") > total(none, "all-gather")


def test_expert_gradients_are_reduced_over_the_devices_that_hold_the_same_experts_alone() -> None:
    for exchange in (RingConfig(), AllToAllConfig()):
        found = sent("data 2 fsdp 4, expert 2", exchange)
        weights = [one for one in found if one.kind in ("all-reduce", "reduce-scatter") and one.array.dims[-2:] in
                   {(D, F), (F, D), (D // 2, F), (F, D // 2)}]  # fmt: skip
        assert weights and all(one.axes <= set(EXPERT_DATA) for one in weights)


def test_the_global_gradient_norm_counts_every_parameter_once() -> None:
    for folding, exchange in ((TED, AllToAllConfig()), ("data 2 fsdp 4, expert 2", RingConfig())):
        mesh = mesh_of(FOLDINGS[folding] or {})
        token, expert, _ = listed("full")

        def value(weights, dispatcher, x, combine, token, expert):
            listed = routing(token, expert, combine, K)
            return (dispatch(dispatcher.build(), x, listed, weights, exchange)[0] ** 2).sum()  # noqa: B023

        def norm(x, combine, weights, token, expert):
            return optax.tree.norm(jax.grad(value)(weights, DroplessConfig(), x, combine, token, expert))

        with jax.set_mesh(mesh):
            found = jax.jit(norm)(*placed(mesh, (*inputs(), token, expert)))
        x, combine, weights = inputs()
        grads = jax.grad(value)(weights, DenseConfig(), x, combine, token, expert)
        close(found, np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads)), "norm")
