"""Importance loss: squared coefficient of variation, over experts, of the probability they are given.

    I_i = sum_t p_ti;   loss = var(I) / mean(I)^2  =  E sum_i P_i^2 - 1        P the mean probability, sum_i P_i = 1

with the variance over the E experts (divided by E), in [0, E - 1]: 0 where the mean is uniform, E - 1 where one expert
takes all. Over several groups: their token-weighted mean. Gradient as in `mean_probability`.
Source: Shazeer et al. 2017 (arXiv 1701.06538, eq. 6-7; from memory, not verified). Differs from the paper: there the
sum is of the combine weights after the top-k; here, as in V-MoE, of the probabilities over all experts. The paper's
second loss, on a smooth estimate of the load under noise, is not here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.balance.mean_probability import MeanProbabilityRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceConfig(MeanProbabilityRule):
    """CV^2 of the summed probabilities, 0 at perfect balance."""

    name: str = "importance"
    """Name in the log."""
    coefficient: float = 0.01
    """Weight in the loss, per layer."""

    def of_mean(self, prob_LGE: jax.Array, num_experts_L: jax.Array) -> jax.Array:
        # Written as deviations: E sum P^2 - 1 would lose its digits close to balance. A group without tokens weighs 0.
        share_L11 = 1.0 / num_experts_L[:, None, None]
        exists_L1E = jnp.arange(prob_LGE.shape[-1]) < num_experts_L[:, None, None]
        deviation_LGE = jnp.where(exists_L1E, prob_LGE - share_L11, 0.0)
        return (deviation_LGE**2).sum(axis=-1) / share_L11[..., 0]
