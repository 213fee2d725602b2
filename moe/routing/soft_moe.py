"""Soft MoE: every expert runs P / E slots, and a slot is a mixture of the sequence's tokens.

    z_sp = x_s phi_p                                         (float32, P = E * slots_per_expert)
    gather_ps  = softmax over the real tokens s of z_sp      slot p reads   sum_s gather_ps x_s
    scatter_sp = softmax over the slots p of z_sp            token s gets   sum_p scatter_sp expert(p)(slot p)

with `normalise`, z_sp = scale * (x_s / |x_s|) (phi_p / |phi_p|), scale a learned scalar from 1: the paper's remedy for
softmaxes that turn one-hot at large widths.

Assignments name slots, not tokens: R = P, slot p goes to its expert with weight 1, and the load is uniform by
construction. `probs` is the scatter mass of a token per expert, `log_z` the logsumexp of its logits over the slots;
nothing is selected, so the margin is +inf and the expert bias is not used.
The group is one sequence: no cut of the batch changes it; a packed sequence mixes its documents. Not causal: a slot
reads every token. Padding is in no softmax and receives zero; a sequence of padding alone has void slots. The cost
follows P, not the number of tokens.

Gradient: through gather, scatter, `probs` and `log_z`. Collectives: none.
Source: Puigcerver et al. 2023 (arXiv 2308.00951, section 2.1; algorithm 2 for `normalise`), from memory, not verified.
Differs from the paper: masks padding.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe import param
from moe.config import at_least
from moe.routing.base import EXACT, EXPERT_AXIS, Context, Router, RouterConfig, Routing, Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftMoEConfig(RouterConfig):
    """Experts run on slots, mixtures of the sequence's tokens."""

    causal: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False

    slots_per_expert: int = 1
    """Slots of a sequence that every expert runs."""
    normalise: bool = False
    """Score directions: unit tokens and unit slot vectors, times one learned scale."""
    init_std: float = 0.02
    """Standard deviation of the slots' initial weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, slots_per_expert=1, init_std=0)

    def experts_per_token(self, num_experts: int) -> float:
        """Experts a token gets something from."""
        return num_experts

    def expert_runs_per_token(self, num_experts: int, seq_len: int) -> float:
        """P / S: the work is that of P slots a sequence."""
        return num_experts * self.slots_per_expert / seq_len

    def build(self, key: jax.Array, width: int, num_experts: int) -> "SoftMoE":
        return SoftMoE(self, key, width, num_experts)


class SoftMoE(Router):
    """Parameters: w_slots [D, E, slots_per_expert] (phi), and scale [] where directions are scored."""

    def __init__(self, config: SoftMoEConfig, key: jax.Array, width: int, num_experts: int):
        self.config = config
        shape = (width, num_experts, config.slots_per_expert)
        self.w_slots = param.normal(key, shape, ("embed", EXPERT_AXIS, None), config.init_std)
        if config.normalise:
            self.scale = param.declare(jnp.float32(1.0), ())

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        (B, S), (_, E, N) = x_BSD.shape[:2], self.w_slots[...].shape
        mask_BS = context.mask_BS
        logits_BSP = self.logits(x_BSD.astype(jnp.float32))
        log_z_BS = jax.nn.logsumexp(logits_BSP, axis=-1)
        scatter_BSP = jnp.where(mask_BS[..., None], jnp.exp(logits_BSP - log_z_BS[..., None]), 0.0)
        # In a sequence of padding alone all logits are equal, instead of -inf, and the mask takes the softmax away.
        mixed_BSP = jnp.where(mask_BS[..., None], logits_BSP, jnp.finfo(jnp.float32).min)
        gather_BPS = jnp.where(mask_BS[:, None], jax.nn.softmax(mixed_BSP, axis=1).swapaxes(1, 2), 0.0)

        slot_P = jnp.arange(E * N, dtype=jnp.int32)
        real_B1 = mask_BS.any(axis=1, keepdims=True)
        return Routing(
            token_BR=jnp.broadcast_to(slot_P, (B, E * N)),
            expert_BR=jnp.where(real_B1, slot_P // N, E),
            weight_BR=jnp.broadcast_to(real_B1, (B, E * N)).astype(jnp.float32),
            probs_BSE=scatter_BSP.reshape(B, S, E, N).sum(axis=-1),
            log_z_BS=jnp.where(mask_BS, log_z_BS, 0.0),
            margin_BS=jnp.full((B, S), jnp.inf),
            slots=Slots(gather_BPS=gather_BPS, scatter_BSP=scatter_BSP),
        )

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, P]."""
        phi_DP = self.w_slots[...].reshape(x_BSD.shape[-1], -1)
        if not self.config.normalise:
            return jnp.einsum("bsd,dp->bsp", x_BSD, phi_DP, precision=EXACT)
        return self.scale[...] * jnp.einsum("bsd,dp->bsp", _unit(x_BSD, -1), _unit(phi_DP, 0), precision=EXACT)


def _unit(vectors: jax.Array, axis: int) -> jax.Array:
    """Vectors along `axis` divided by their length; 0, with a finite gradient, where they are 0."""
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(axis=axis, keepdims=True), 1e-12))
