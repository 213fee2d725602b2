"""Forced balance: experts in turn, so that the load is even by construction. For measurements, not for models.

    expert of assignment k of the n-th real token of sequence g = (g K + n K + k) mod E,    w = 1 / K

Inside a sequence loads differ by at most 1. They are equal where E divides K times its real tokens; over sequences of
equal length also where E divides K times the number of sequences. Speed and memory measured with it are those of a
perfectly balanced router, without the cost of scoring.

The probabilities handed to the balance rules are 1 / K on the chosen experts; `log_z` is 0, the margin infinite.
No parameters, so there is no task gradient. An expert bias is ignored. Symmetric under rotations of the experts only,
which no parameter could follow: declared asymmetric. Collectives: none. Generation one token at a time starts every
token at n = 0.
Source: the forced-balance switches of Megatron-LM and other training systems. Differs from them: they draw random
logits, which are even on average only.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe.routing.base import Context, Router, Routing, TokenChoiceConfig
from moe.routing.choice import unscored


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobinConfig(TokenChoiceConfig):
    """Experts in turn: an even load."""

    task_gradient: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False

    def build(self, key: jax.Array, width: int, num_experts: int) -> "RoundRobin":
        return RoundRobin(self, num_experts)


class RoundRobin(Router):
    """[B, S] tokens -> `Routing` with K assignments each; neither vectors nor ids are read."""

    def __init__(self, config: RoundRobinConfig, num_experts: int):
        self.num_selected, self.num_experts = config.num_selected, num_experts

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        K, E = self.num_selected, self.num_experts
        # Counting real tokens up to here: later ones and padding have no say.
        turn_BS = context.sequence_B[:, None] % E + jnp.cumsum(context.mask_BS, axis=1) - 1
        expert_BSK = (turn_BS[..., None] * K + jnp.arange(K)) % E
        return unscored(context, expert_BSK, E)

    def permutation(self, key: jax.Array, num_experts: int) -> None:
        return None
