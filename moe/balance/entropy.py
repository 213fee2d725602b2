"""Entropy of the mean probability: pushes the average token, and not every token, towards a uniform router.

    loss = sum_g (n_g / n) sum_i P_gi log P_gi  =  -(mean entropy of the groups' mean probabilities)

in nats, so in [-log E, 0]: -log E where every group's mean is uniform, be its tokens uniform or one-hot on different
experts; 0 where one expert takes all. The gradient comes from the whole group's mean, see `mean_probability`: the mean
of per-device or per-micro-batch entropies is another, larger loss (Jensen). It bounds probability mass, not the load.
Source: Csordas et al. 2023, sigma-MoE (arXiv 2310.10837), regulariser as in the authors' code. Differs from the paper:
the mean is taken of the probabilities the router hands to all balance rules, and not in log space; scopes other than
global are ours. The authors use the softmax of the logits even where the selection is sigmoid.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.balance.mean_probability import MeanProbabilityRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyConfig(MeanProbabilityRule):
    """sum_i P_i log P_i, -log E at perfect balance."""

    name: str = "entropy"
    """Name in the log."""
    coefficient: float = 1e-3
    """Weight in the loss, per layer (sigma-MoE: 1e-4 to 1e-3)."""

    def of_mean(self, prob_LGE: jax.Array, num_experts_L: jax.Array) -> jax.Array:
        some_LGE = jnp.where(prob_LGE > 0, prob_LGE, 1.0)
        return (some_LGE * jnp.log(some_LGE)).sum(axis=-1)
