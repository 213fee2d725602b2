"""Statistics written by hand: what a test does not name is zero."""

from typing import Any

import jax.numpy as jnp

from moe.balance.statistics import Statistics


def made(count_BE: Any, **others: Any) -> Statistics:
    """Statistics of counts [..., B, E]; `widths` and any other field by name."""
    count = jnp.asarray(count_BE, jnp.int32)
    ints, floats = jnp.zeros(count.shape[:-1], jnp.int32), jnp.zeros(count.shape[:-1], jnp.float32)
    fields = {
        "prob_BE": jnp.zeros(count.shape, jnp.float32), "z_B": floats, "chosen_prob_B": floats, "margin_B": floats,
        "tokens_B": ints, "dropped_B": ints, "unserved_B": ints,
    }  # fmt: skip
    return Statistics(count_BE=count, **(fields | others))
