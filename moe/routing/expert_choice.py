"""Expert choice: every expert takes the C tokens of the sequence that score it highest.

    z = x W_router                                   (float32)
    p = softmax_E(z)
    tokens of expert e = top-C over s of p_se,       C = ceil(capacity_factor * S / E)
    w = p_se

The group that competes is one sequence: the config, never the mesh, says who competes with whom, so no cut of the batch
changes it. A packed sequence is one group, whatever documents it holds. Every expert has the same load by construction
(a load-balance loss is 1 whatever it does) and a token gets between 0 and E experts. Padding is never taken: with
fewer than C real tokens an expert takes them all and its other assignments are void. Of equal scores the earlier token
wins. R = E * C, expert-major.

Not causal (a later token can push out an earlier one) and not padding invariant (C counts positions).
The expert bias is not used: it would move all tokens of an expert alike and change no choice.
`margin`: how far a token's score is from the nearest choice that would fall otherwise, min over experts of
p - (best score left out) where taken and (worst score taken) - p where left out; +inf if nothing is left out.

Gradient: through `weight`, `probs` and `log_z`; the choice carries none. Collectives: none.
Source: Zhou et al. 2022 (arXiv 2202.09368, section 3.2), from memory, not verified.
Differs from the paper: groups are sequences, and C is rounded up.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.kernels.highest import highest
from moe.routing.base import SAVED_NAME, Context, LinearScoresConfig, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(LinearScoresConfig):
    """Every expert picks its tokens."""

    causal: ClassVar[bool] = False
    padding_invariant: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False

    capacity_factor: float = 2.0
    """Experts per token on average; an expert takes ceil(capacity_factor * S / E) tokens of a sequence of S."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.capacity_factor > 0:
            yield "capacity_factor", "must be greater than 0"

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        if self.capacity_factor > num_experts:
            yield "capacity_factor", f"must be at most num_experts = {num_experts}: every expert takes every token"

    def experts_per_token(self, num_experts: int) -> float:
        return self.capacity_factor

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        B, S, E = logits_BSE.shape
        C = min(S, math.ceil(self.capacity_factor * S / E - 1e-9))  # 1.1 * 10 is 11.000000000000002
        mask_BS = context.mask_BS
        log_z_BS = jax.nn.logsumexp(logits_BSE, axis=-1)
        probs_BSE = jnp.where(mask_BS[..., None], jnp.exp(logits_BSE - log_z_BS[..., None]), 0.0)
        score_BES = jax.lax.stop_gradient(probs_BSE).swapaxes(1, 2)
        select_BES = jnp.where(mask_BS[:, None], score_BES, -jnp.inf)
        best_BEc, token_BEc = highest(select_BES, min(C + 1, S), ("batch",))
        token_BEC = checkpoint_name(token_BEc[..., :C], SAVED_NAME)

        worst_in_BE1 = best_BEc[..., C - 1 : C]
        best_out_BE1 = best_BEc[..., C:] if C < S else jnp.full((B, E, 1), -jnp.inf)
        taken_BES = score_BES >= worst_in_BE1  # of equal scores some are left out: their margin is 0 either way
        margin_BS = jnp.where(taken_BES, score_BES - best_out_BE1, worst_in_BE1 - score_BES).min(axis=1)

        void_BEC = ~jnp.take_along_axis(jnp.broadcast_to(mask_BS[:, None], (B, E, S)), token_BEC, axis=-1)
        expert_BEC = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[:, None], (B, E, C))
        return Routing(
            token_BR=token_BEC.reshape(B, E * C),
            expert_BR=jnp.where(void_BEC, E, expert_BEC).reshape(B, E * C),
            weight_BR=jnp.take_along_axis(probs_BSE.swapaxes(1, 2), token_BEC, axis=-1).reshape(B, E * C),
            probs_BSE=probs_BSE,
            log_z_BS=jnp.where(mask_BS, log_z_BS, 0.0),
            margin_BS=jnp.where(mask_BS, margin_BS, jnp.inf),
        )
