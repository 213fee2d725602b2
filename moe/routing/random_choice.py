"""Random router: every token takes K distinct experts drawn uniformly, with weight 1 / K.

The draw depends on seed, step, layer, sequence and position, so it survives every cut of the batch. It is made in
evaluation too, where the key is fixed: an expert there gets what it was trained on, a random share of all
tokens, and the same evaluation gives the same number. A token that is generated draws at its place in the row it is
computed in, so generation one token at a time draws other experts than reading the same text at once.

The probabilities handed to the balance rules are 1 / E: no expert is preferred. `log_z` is 0, the margin infinite.
No parameters, so there is no task gradient: nothing is learned. An expert bias is ignored. Symmetric only in
distribution: renaming experts would rename the draw. Collectives: none.
Source: the random baseline of Roller et al. 2021 (arXiv 2106.04426) and Zuo et al. 2021, THOR (arXiv 2110.04260); from
memory, not verified.
Differs from the paper: no consistency loss between two draws (THOR).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe.routing import noise
from moe.routing.base import Context, Router, Routing, TokenChoiceConfig
from moe.routing.choice import top_k, unscored


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomConfig(TokenChoiceConfig):
    """Experts drawn uniformly for every token."""

    task_gradient: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False

    num_selected: int = 1
    """K, experts per token."""

    def build(self, key: jax.Array, width: int, num_experts: int) -> "RandomRouter":
        return RandomRouter(self, num_experts)


class RandomRouter(Router):
    """[B, S] tokens -> `Routing` with K assignments each; neither vectors nor ids are read."""

    def __init__(self, config: RandomConfig, num_experts: int):
        self.num_selected, self.num_experts = config.num_selected, num_experts

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        K, E = self.num_selected, self.num_experts
        expert_BSK, _ = top_k(noise.uniform(context, E, noise.CHOICE), K)
        uniform_BSE = jnp.full((*context.token_BS.shape, E), 1.0 / E, jnp.float32)
        return unscored(context, expert_BSK, E, uniform_BSE)

    def permutation(self, key: jax.Array, num_experts: int) -> None:
        return None
