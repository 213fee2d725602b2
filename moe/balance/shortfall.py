"""How much score experts lack to be chosen, as a histogram: what the layers count for quantile balancing.

    d_te = cutoff_t - s_te            s the selection scores, bias included; cutoff the best score left out
    below_eh = #{real t : d_te < edge_h}

Expert e is taken by token t where d_te < 0, and would be if its bias rose by d_te. No gradient. Collectives: one sum of
[E, bins + 1] counts per layer, placed by XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe.routing.base import Routing


def edges(reach: float, bins: int) -> np.ndarray:
    """float32 [bins + 1] from -reach to reach. With an odd number of bins 0, the runner-up's, is inside of one."""
    return np.linspace(-reach, reach, bins + 1).astype(np.float32)


def count_below(routing: Routing, mask_BS: jax.Array, reach: float, bins: int) -> jax.Array:
    """int32 [E, bins + 1] real tokens that lack less than each edge. Raises if the router selects by no score."""
    select_BSE = routing.select_BSE
    if select_BSE is None or routing.num_selected is None:
        raise ValueError("quantile balancing needs a router whose tokens take the experts of the best scores")
    B, S, _ = select_BSE.shape
    expert_BSK = routing.expert_BR.reshape(B, S, -1)
    taken_BSK = jnp.take_along_axis(select_BSE, expert_BSK, axis=-1, mode="fill", fill_value=jnp.inf)
    cutoff_BS = taken_BSK.min(axis=-1) - routing.margin_BS
    missing_BSE = jnp.where(mask_BS[..., None], cutoff_BS[..., None] - select_BSE, jnp.inf)
    # A comparison with every edge fuses into one reduction; a scatter would not partition over devices.
    return (missing_BSE[..., None] < edges(reach, bins)).sum(axis=(0, 1), dtype=jnp.int32)
