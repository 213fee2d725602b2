"""sigma-MoE: experts do not compete; each is scored by a sigmoid of its own, and used with that score.

    z = x W_router,   s = sigmoid(z)
    chosen = top-K of  stop_gradient(s) + bias  over the experts that are not dropped,    w = s_chosen

No normalisation. Expert dropout, in training: every (token, expert) is dropped with probability `dropout` before the
selection; nothing is rescaled. Where fewer than K experts are left, dropped ones fill the places: with weight 0, though
they count in the load (the assignment is made), and never with an infinite score that could become NaN.

The probabilities handed to the balance rules are softmax(z) of the raw logits, although sigmoids select: an entropy
rule on their batch mean is the paper's regulariser. Initialisation: columns of W_router [D, E] (an expert's vector)
scaled to one norm, the standard deviation of the whole matrix kept.

Gradient: through `weight`, `probs` and `log_z`; none to a dropped score. Collectives: none. The margin is the gap of
selection scores; where a dropped expert is the first left out, the gap to it is widened by the range of scores plus 1.
Source: Csordas et al. 2023 (arXiv 2310.10837, section 5) and its released code (RobertCsordas/moe).
Differs from the paper: an expert bias is accepted; the paper's scale sqrt(2 / (L D)) is the caller's `init_std`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.config import at_least
from moe.routing import noise
from moe.routing.base import SAVED_NAME, Context, LinearRouterConfig, Routing
from moe.routing.choice import token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaConfig(LinearRouterConfig):
    """Sigmoid selection without competition, with expert dropout."""

    dropout: float = 0.0
    """Probability that a token cannot choose an expert, in training (paper: 0.05 to 0.1)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, dropout=0)
        if not self.dropout < 1:
            yield "dropout", "must be less than 1"

    def initial(self, key: jax.Array, width: int, num_experts: int) -> jax.Array:
        plain_DE = super().initial(key, width, num_experts)
        level_DE = plain_DE / jnp.maximum(jnp.linalg.norm(plain_DE, axis=0, keepdims=True), 1e-30)
        return level_DE * (plain_DE.std() / jnp.maximum(level_DE.std(), 1e-30))

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        scores_BSE = jax.nn.sigmoid(logits_BSE)
        select_BSE = jax.lax.stop_gradient(scores_BSE) + bias_E
        if self.dropout and context.train:
            draw_BSE = noise.uniform(context, logits_BSE.shape[-1], noise.DROPOUT)
            kept_BSE = checkpoint_name(draw_BSE >= self.dropout, SAVED_NAME)
            scores_BSE = jnp.where(kept_BSE, scores_BSE, 0.0)
            span_BS1 = select_BSE.max(axis=-1, keepdims=True) - select_BSE.min(axis=-1, keepdims=True)
            select_BSE = jnp.where(kept_BSE, select_BSE, select_BSE - span_BS1 - 1.0)
        expert_BSK, margin_BS = top_k(select_BSE, self.num_selected)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=jnp.take_along_axis(scores_BSE, expert_BSK, axis=-1),
            probs_BSE=jax.nn.softmax(logits_BSE, axis=-1),
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=margin_BS,
            select_BSE=select_BSE,
        )
