"""Hash router: a token's experts follow from its id alone.

    r_e = hash(seed, token id, e) in [0, 2^32),    chosen = the K experts of highest r,    w = 1 / K

The highest of E random numbers: K distinct experts, each as likely as any other, from a few lines of arithmetic and no
table of the vocabulary. The experts for K are the first of those for K + 1. All layers with one seed agree.

The probabilities handed to the balance rules are 1 / K on the chosen experts, `log_z` is 0 and the margin infinite:
there are no scores. Padding is void. No parameters, so there is no task gradient: nothing is learned, which is the
point of the baseline. An expert bias is ignored. Not symmetric under any renaming of experts. Collectives: none.
Source: Roller et al. 2021, Hash Layers (arXiv 2106.04426; from memory, not verified).
Differs from the paper: random hash only, without the balanced and clustered tables; K of the paper's MultiHash split
the hidden width, here they are K experts.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe.config import at_least
from moe.kernels.highest import highest
from moe.routing.base import Context, Router, Routing, TokenChoiceConfig
from moe.routing.choice import unscored


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashConfig(TokenChoiceConfig):
    """Experts by a hash of the token id."""

    task_gradient: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False

    num_selected: int = 1
    """K, experts per token."""
    seed: int = 0
    """Another seed, another hash."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_selected=1, seed=0)
        if self.seed >= 2**32:
            yield "seed", "must be below 2^32"

    def build(self, key: jax.Array, width: int, num_experts: int) -> "HashRouter":
        return HashRouter(self, num_experts)


class HashRouter(Router):
    """Token ids [B, S] -> `Routing` with K assignments a token; the vectors are not read."""

    def __init__(self, config: HashConfig, num_experts: int):
        self.num_selected, self.seed, self.num_experts = config.num_selected, config.seed, num_experts

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        E = self.num_experts
        of_token_BS = _mix(context.token_BS.astype(jnp.uint32) ^ _mix(jnp.uint32(self.seed)))
        random_BSE = _mix(of_token_BS[..., None] + _mix(jnp.arange(1, E + 1, dtype=jnp.uint32)))
        _, expert_BSK = highest(random_BSE, self.num_selected)
        return unscored(context, expert_BSK, E)

    def permutation(self, key: jax.Array, num_experts: int) -> None:
        return None


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit moves every output bit: two rounds of multiply and fold."""
    x = x + jnp.uint32(0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 16)) * jnp.uint32(factor)
    return x ^ (x >> 16)
