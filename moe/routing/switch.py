"""Switch: every token takes the one expert it scores highest.

    z = x' W_router,   x' = x * U(1 - jitter, 1 + jitter) in training, x in evaluation
    p = softmax(z)
    chosen = argmax of  stop_gradient(p) + bias,    w = p_chosen

The weight is the probability over all experts: normalised over the one chosen it would be 1, and the task could not
teach the router. Random token selection gives every token a random priority in training, for a buffer that overflows
(`CapacityConfig(keep="priority")`): the end of a sequence is then not dropped more often than its beginning. In
evaluation all priorities are 0, and the first tokens stay.

Gradient: through `weight`, `probs` and `log_z`. Collectives: none.
Source: Fedus et al. 2021 (arXiv 2101.03961, eq. 1-3; section 2.4 for jitter and initialisation: from memory, not
verified); random token selection: Kim et al. 2021 (arXiv 2109.10465; from memory, not verified).
Differs from the paper: an expert bias is accepted; no capacity of its own, which is the dispatcher's.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe.config import at_least
from moe.routing import noise
from moe.routing.base import Context, LinearScoresConfig, Routing
from moe.routing.choice import token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchConfig(LinearScoresConfig):
    """Switch top-1."""

    init_std: float = 0.0
    """Standard deviation of the router's initial weights before they are cut at 2 of them; 0: sqrt(0.1 / D)."""
    jitter: float = 0.01
    """In training, scored inputs are multiplied by U(1 - jitter, 1 + jitter)."""
    random_token_selection: bool = False
    """Give tokens a random priority in training; needs dispatch by CapacityConfig(keep="priority")."""

    @property
    def gives_priority(self) -> bool:
        return self.random_token_selection

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, jitter=0)
        if not self.jitter < 1:
            yield "jitter", "must be less than 1, or inputs change sign"

    def experts_per_token(self, num_experts: int) -> float:
        return 1

    def initial(self, key: jax.Array, width: int, num_experts: int) -> jax.Array:
        std = self.init_std or math.sqrt(0.1 / width)
        return std * jax.random.truncated_normal(key, -2.0, 2.0, (width, num_experts), jnp.float32)

    def inputs(self, x_BSD: jax.Array, context: Context) -> jax.Array:
        return noise.jitter(x_BSD, context, self.jitter)

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        probs_BSE = jax.nn.softmax(logits_BSE, axis=-1)
        select_BSE = probs_BSE + bias_E
        expert_BS1, margin_BS = top_k(select_BSE, 1)
        return token_choice(
            context,
            expert_BSK=expert_BS1,
            weight_BSK=jnp.take_along_axis(probs_BSE, expert_BS1, axis=-1),
            probs_BSE=probs_BSE,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=margin_BS,
            select_BSE=select_BSE,
            priority_BSK=self._priority(context) if self.random_token_selection else None,
        )

    def _priority(self, context: Context) -> jax.Array:
        if context.train:
            return noise.uniform(context, 1, noise.PRIORITY)
        return jnp.zeros((*context.token_BS.shape, 1), jnp.float32)
