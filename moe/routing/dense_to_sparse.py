"""Dense-to-sparse: a Gumbel-softmax whose falling temperature shrinks the set of active experts.

    z = x W_router                                                     (float32)
    g = softmax((z + zeta) / tau(step)),   zeta_e ~ Gumbel(0, 1)       per token and expert, in training
    active = {e : g_e > threshold}                                     before `switch_step`
    active = {argmax g}                                                from `switch_step` on, and always in evaluation
    w_e = g_e  |  softmax(z)_e                                         e active; not renormalised

At a high temperature every expert is active, at a low one a single expert is; for fixed noise the active sets are
nested (log g_e is concave in 1 / tau and starts above log threshold). Because the weights are not renormalised, the
scale of the layer's output drifts with tau.

Evaluation draws no noise (zeta = 0) and takes the best expert alone, whatever tau is: before the temperature is low, a
model is evaluated sparser than it trains. Its weight is of the kind that training uses: softmax(z / tau) or softmax(z).

The cost is that of E experts from the first step to the last: shapes are static, so an inactive expert is a void
assignment, not a saving. This router is for studying the schedule; for the speed of its sparse phase, go on with top-k
from a checkpoint. R = S * E, token-major, experts in order. The load counts active experts alone, so tokens may count
differently often.

`probs` are the scores the weights come from. `margin` is the lowest active g minus the highest inactive one (+inf if
all are active). The expert bias is not used: it would activate experts whose weight is about 0.
Gradient: through `weight`, `probs` and `log_z`, at fixed noise; the active set carries none. Collectives: none.
Source: EvoMoE (Nie et al. 2021, arXiv 2112.14397) and its released code (codecaution/EvoMoE,
fairseq/modules/moe/topkgate.py). The paper's tau 2.0 -> 0.3 and threshold 1e-3 are from memory, not verified.
Differs from the paper: growing the experts out of one is not here. Differs from its code: there the default
switch_step of -1 makes every step hard, here None means never; there some evaluations draw noise.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.routing import noise
from moe.routing.base import SAVED_NAME, Context, LinearScoresConfig, Routing
from moe.routing.choice import token_choice
from moe.routing.temperature import TemperatureConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseToSparseConfig(LinearScoresConfig):
    """Gumbel-softmax with a falling temperature; costs E experts a token at every step."""

    uses_bias: ClassVar[bool] = False

    temperature: TemperatureConfig = TemperatureConfig()
    """tau by optimizer step."""
    threshold: float = 1e-3
    """An expert is active where its score is above this; below 1 / num_experts, or no expert might be."""
    weights: Literal["noisy", "clean"] = "noisy"
    """Combine weights: the noisy scores g themselves, or softmax(z) on the experts that g made active."""
    switch_step: int | None = None
    """From this step on only the expert with the highest g is active; None: never."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not 0 <= self.threshold < 1:
            yield "threshold", "must be at least 0 and less than 1"
        if self.switch_step is not None and self.switch_step < 0:
            yield "switch_step", "must be at least 0, or None for never"

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        if not self.threshold < 1 / num_experts:
            limit = f"must be less than 1 / num_experts = {1 / num_experts:.3g}"
            yield "threshold", f"{limit}: at a high temperature every score is that"

    def experts_per_token(self, num_experts: int) -> float:
        return num_experts

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        E = logits_BSE.shape[-1]
        tau = self.temperature.at(context.step)
        noisy_BSE = logits_BSE + noise.gumbel(context, E) if context.train else logits_BSE
        scores_BSE = jax.nn.softmax(noisy_BSE / tau, axis=-1)
        used_BSE = scores_BSE if self.weights == "noisy" else jax.nn.softmax(logits_BSE, axis=-1)

        g_BSE = jax.lax.stop_gradient(scores_BSE)
        active_BSE = checkpoint_name(self._active(g_BSE, context), SAVED_NAME)
        lowest_BS = jnp.where(active_BSE, g_BSE, jnp.inf).min(axis=-1)
        return token_choice(
            context,
            expert_BSK=jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), logits_BSE.shape),
            weight_BSK=used_BSE,
            probs_BSE=used_BSE,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=lowest_BS - jnp.where(active_BSE, -jnp.inf, g_BSE).max(axis=-1),
            taken_BSK=active_BSE,
        )

    def _active(self, g_BSE: jax.Array, context: Context) -> jax.Array:
        """bool [B, S, E]."""
        best_BSE = jnp.arange(g_BSE.shape[-1]) == g_BSE.argmax(axis=-1, keepdims=True)
        if not context.train:
            return best_BSE
        above_BSE = g_BSE > self.threshold
        if self.switch_step is None:
            return above_BSE
        return jnp.where(context.step >= self.switch_step, best_BSE, above_BSE)
